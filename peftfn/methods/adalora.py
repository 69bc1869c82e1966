"""AdaLoRA: W + s·B diag(E) A, with the rank shared out among the sites in training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.method import Cases, Leaf, Peft, choice, positive
from peftfn.methods.variant import _Variant, leaves_of
from peftfn.rng import Rng


@dataclass(frozen=True)
class AdaLoRA(_Variant):
    """W + s·B diag(E) A, with A [rank, in], E [rank], B [out, rank] and s = alpha/(rank + 1e-5) as in PEFT.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, arXiv:2303.10512.
    In training, add `orthogonal`·`orthogonality(adapter)` to the loss, and after each step call `allocate`, which sets
    the entries of E to zero that matter least among all sites.

    Args:
        rank: triplets of a site before any is taken away.
        alpha: numerator of the scale; None means rank.
        dropout: probability of dropping an input feature of A in train mode.
        init_weights: "default" (A and B normal with std 0.02, E zero) or "random" (all normal: not the identity).
        target_rank: triplets that a site keeps in the end, on average.
        warmup: steps before the first triplet goes.
        final: steps at the end in which the choice is fixed.
        interval: steps between two choices.
        total_steps: of the training; `allocate` needs it.
        beta1, beta2: decay per step of the averages of importance and of its uncertainty.
        orthogonal: weight of the penalty in the loss.

    Raises:
        ValueError: warmup and final leave no step between them.
    """

    cases: ClassVar[Cases] = ({"rank": 3, "alpha": 2.0}, {"rank": 2, "init_weights": "random"})

    peft = Peft(
        "ADALORA",
        keys={"a": "lora_A", "b": "lora_B", "e": "lora_E"},
        fields={
            "rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_rank": "target_r",
            "warmup": "tinit", "final": "tfinal", "interval": "deltaT", "total_steps": "total_step", "beta1": "beta1",
            "beta2": "beta2", "orthogonal": "orth_reg_weight",
        },
    )  # fmt: skip

    rslora: ClassVar[bool] = False  # type: ignore[misc]
    rank: int = 12
    target_rank: int = 8
    warmup: int = 0
    final: int = 0
    interval: int = 1
    total_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "init_weights", ("default", "random"))
        positive(self, interval=self.interval, target_rank=self.target_rank)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"AdaLoRA.{name} is {beta}; it is the decay of an average: 0 < {name} < 1")
        if self.total_steps is not None and self.warmup >= self.total_steps - self.final:
            raise ValueError(
                f"AdaLoRA.warmup is {self.warmup} and final {self.final}, of {self.total_steps} steps: none is left to "
                "share out the rank in; lower one of them or raise total_steps"
            )

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, std = w.shape, self.rank, 0.02 if self.identity else 1.0
        e = rng.zeros(r) if self.identity else rng.normal(r)
        return {"a": rng.normal(r, in_, std=std), "b": rng.normal(out, r, std=std), "e": e}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"down": p["a"], "up": self.scale * p["b"] * p["e"]}

    def to_peft(self) -> dict[str, Any]:
        if self.total_steps is None:
            raise ValueError("AdaLoRA.total_steps is None, and PEFT loads none without: give the number of steps")
        return super().to_peft()

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        return super().to_peft_leaf(p | {"e": p["e"][..., None]})


def orthogonality(adapter: Mapping[str, Leaf]) -> Tensor:
    """Mean of ‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F over all AdaLoRA leaves: a penalty for the loss, times `orthogonal`."""
    return torch.cat(
        [off_orthogonal(p).flatten() for p in leaves_of("AdaLoRA", adapter, "a", "b", "e").values()]
    ).mean()


def off_orthogonal(p: Leaf) -> Tensor:
    """‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F of a leaf, [2]; [2, e] of a stack."""
    grams = p["a"] @ p["a"].mT, p["b"].mT @ p["b"]
    off = [g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) for g in grams]
    return torch.stack([torch.linalg.vector_norm(t, dim=(-2, -1)) for t in off])


@dataclass(frozen=True)
class Allocation:
    """What the allocator knows after a step: averages of the shape of the leaves, and which triplets are kept."""

    method: AdaLoRA
    importance: dict[str, Leaf]
    uncertainty: dict[str, Leaf]
    kept: dict[str, Tensor]  # site → bool [rank]

    @classmethod
    def start(cls, method: AdaLoRA, adapter: Mapping[str, Leaf]) -> "Allocation":
        """Before the first step. `method`: whose schedule it is; all AdaLoRA leaves of the adapter share one budget."""
        if method.total_steps is None or method.target_rank > method.rank:
            raise ValueError(f"{method} has no schedule to follow: give total_steps, and target_rank <= rank")
        zero = {
            n: {k: torch.zeros_like(t) for k, t in p.items()}
            for n, p in leaves_of("AdaLoRA", adapter, "a", "b", "e").items()
        }
        return cls(method, zero, zero, {n: torch.ones_like(p["e"], dtype=torch.bool) for n, p in zero.items()})

    def budget(self, step: int) -> int:
        """Triplets that all sites together keep at a step: a cubic from all of them to target_rank a site."""
        m, start = self.method, sum(t.numel() for t in self.kept.values())
        end = m.target_rank * sum(t[..., 0].numel() for t in self.kept.values())
        left = 1 - (step - m.warmup) / ((m.total_steps or 0) - m.final - m.warmup)
        return int((start - end) * min(max(left, 0.0), 1.0) ** 3 + end)


@torch.no_grad()
def allocate(
    state: Allocation, adapter: Mapping[str, Leaf], grads: Mapping[str, Leaf], step: int
) -> tuple[Allocation, dict[str, Leaf]]:
    """(state, adapter) after optimizer step number `step` (from 0), with E zero where a triplet is not kept.

    grads: those the step was taken with. Importance of an entry is |value · gradient|, averaged; its score is that
    average times the average of its own fluctuation; a triplet's is E's plus the means over its row of A and column
    of B. Entries that were set to zero may grow again until the last choice.
    """
    m = state.method
    last = (m.total_steps or 0) - m.final
    if step < last:

        def smooth(old: Mapping[str, Leaf], new: Mapping[str, Leaf], beta: float) -> dict[str, Leaf]:
            return {n: {k: beta * t + (1 - beta) * new[n][k] for k, t in p.items()} for n, p in old.items()}

        now = {n: {k: (adapter[n][k] * grads[n][k]).abs() for k in p} for n, p in state.importance.items()}
        mean = smooth(state.importance, now, m.beta1)
        change = {n: {k: (t - mean[n][k]).abs() for k, t in p.items()} for n, p in now.items()}
        state = replace(state, importance=mean, uncertainty=smooth(state.uncertainty, change, m.beta2))
    if step == last or (m.warmup < step < last and step % m.interval == 0):
        score = {}
        for n, p in state.importance.items():
            s = {k: t * state.uncertainty[n][k] for k, t in p.items()}
            score[n] = s["e"] + s["a"].mean(-1) + s["b"].mean(-2)
        every = torch.cat([s.flatten() for s in score.values()])
        drop = every.numel() - state.budget(step)
        bar = every.kthvalue(drop).values if drop else every.new_tensor(-1.0)
        state = replace(state, kept={n: s > bar for n, s in score.items()})
    elif step <= last:
        return state, dict(adapter)
    masked = {n: {**adapter[n], "e": adapter[n]["e"] * kept} for n, kept in state.kept.items()}
    return state, {**adapter, **masked}
