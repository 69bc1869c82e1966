"""VeLoRA: W + s·B A, whose gradient of A is made from one number a group of features."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt
from peftfn.core.method import Leaf, LowRank
from peftfn.core.rng import Rng
from peftfn.methods.weights.lora import LoRA
from peftfn.tensors.transform import under_transform


@dataclass(frozen=True)
class VeLoRA(LoRA):
    """W + s·B A as `LoRA`; in train mode, x is kept for A's gradient as c_g = ⟨x_g, e⟩ for each group x_g of features,
    and comes back as restore·c_g e, with a unit vector e [⌈in/groups⌉].

    Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", 2024, arXiv:2405.17991.
    It saves memory in plain `.backward()` alone: torch.func's transforms, compilers and layers that are not linear take
    LoRA's exact gradient. The last group is filled up with zeros.

    Trainable parameters per site: rank·(in + out). Use it to train in little memory, with compressed activations.

    Args:
        rank, alpha, rslora, dropout, lora_bias, init_weights: as for `LoRA`.
        groups: of input features: numbers kept a token.
        restore: factor on what comes back.
        projection: e is the direction of the "batch"'s mean group, or a "fixed" constant (random, or a checkpoint's).
        compress: do so in train mode.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.VeLoRA(rank=4, groups=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0, "groups": 3},
        {"rank": 3, "rslora": True, "groups": 4, "projection": "fixed", "init_weights": "random"},
    )

    in_eval = (("dropout", 0.0), ("compress", False))
    peft = replace(
        LoRA.peft,
        keys={**LoRA.peft.keys, "e": "lora_velora_embed"},
        fields={
            **LoRA.peft.fields,
            "groups": "velora_config.num_groups",
            "restore": "velora_config.scale",
            "projection": "velora_config.init_type",
        },
        values={"projection": [("batch", "batch_average"), ("fixed", "random"), ("fixed", "batch_average_once")]},
        fixed={"velora_config": ...},
    )

    groups: PositiveInt = 64
    restore: Positive = 1.0
    projection: Literal["batch", "fixed"] = "batch"
    compress: bool = True

    @property
    def exact_gradient(self) -> bool:
        return not self.compress

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        d = -(-w.shape[1] // self.groups)
        return {"e": rng.zeros(d) if self.projection == "batch" else _unit(rng.normal(d))}

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        skip = torch.compiler.is_compiling() or under_transform() or not torch.is_grad_enabled()
        if skip or not self.compress or "e" not in p:
            return super().linear(p, w, x)
        dropped = F.dropout(x, self.dropout) if self.dropout else x
        e = p["e"] if self.projection == "fixed" else _unit(_grouped(dropped.detach(), self.groups).mean((0, 1)))
        low: Tensor = _Compressed.apply(dropped, p["a"], e, self.groups, self.restore)  # type: ignore[no-untyped-call]
        return F.linear(x, w) + F.linear(self.scale * low, p["b"])

    def low_rank(self, p: Leaf) -> LowRank | None:
        return None if self.compress else super().low_rank(p)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[..., in] → [tokens, groups, d], with zeros at the end."""
    d = -(-x.shape[-1] // groups)
    return F.pad(x.reshape(-1, x.shape[-1]), (0, groups * d - x.shape[-1])).unflatten(1, (groups, d))


def _unit(v: Tensor) -> Tensor:
    """v/‖v‖; for zero, the vector whose entries are all alike."""
    n = torch.linalg.vector_norm(v)
    return torch.where(n > 0, v / n, torch.ones_like(v) / v.numel() ** 0.5)


class _Compressed(Function):
    """x Aᵀ, keeping c = x's groups · e [tokens, groups] in place of x."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, e: Tensor, groups: int, restore: float) -> Tensor:
        return F.linear(x, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, a, e, groups, ctx.restore = inputs
        ctx.save_for_backward(_grouped(x.detach(), groups) @ e.to(x.dtype), a, e)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        c, a, e = ctx.saved_tensors
        dx = (dy @ a).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        mixed = dy.reshape(-1, dy.shape[-1]).mT @ c.to(dy.dtype)  # [rank, groups]
        da = ctx.restore * (mixed[..., None] * e).flatten(1)[:, : a.shape[1]]
        return dx, da.to(a.dtype), None, None, None
