"""What tests in several folders need."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._pytree import tree_map

import peftfn as pf
import peftfn.methods  # registers them
from peftfn.core.method import Method, registry
from peftfn.core.plan import Plan
from peftfn.net.net import replanned

ROOT = Path(__file__).parents[1]
OURS = [cls(**case) for cls in registry.values() if cls.__module__.startswith("peftfn.methods") for case in cls.cases]
METHODS = [m for m in OURS if isinstance(m, pf.Weight)]
AROUND = [m for m in OURS if isinstance(m, pf.ModuleMethod)]
"""Methods around a module."""
ALONG = [m for m in OURS if isinstance(m, pf.Along)]
"""Methods whose state goes along a backbone's blocks."""
INPUTS = list({type(m): m for m in reversed(OURS) if isinstance(m, pf.Tokens | pf.Prefix)}.values())
"""One of each method on a backbone's inputs."""
CHAINS: list[Method] = [
    pf.chain(pf.LoRA(rank=2), pf.IA3()),
    pf.chain(pf.IA3(feedforward=True), pf.DoRA(rank=2)),
    pf.chain(pf.OFT(block_size=2), pf.LoRA(rank=2), pf.OFT(block_size=2, side="output")),
]
FIRST = list({type(m): m for m in reversed(METHODS + CHAINS)}.values())
"""One of each: for what is around a method, and for what is slow."""


def small_gpt2(layers: int) -> Any:
    """The configuration of a small GPT-2, whose special tokens are in its vocabulary."""
    import transformers as tf

    sizes: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_positions": 32}
    return tf.GPT2Config(**sizes, n_layer=layers, bos_token_id=1, eos_token_id=2)


def everywhere(net: pf.Adapted) -> pf.Adapted:
    """The net whose activated LoRAs act on all tokens, for tests of models that are called without token ids."""
    fields = [f.name for f in dataclasses.fields(pf.LoRA)]
    entries = {
        n: dataclasses.replace(e, method=pf.LoRA(**{k: getattr(e.method, k) for k in fields})) if e.gated else e
        for n, e in net.plan.entries.items()
    }
    return replanned(net, Plan(entries, net.plan.rules, net.plan.banks))


def random(net: pf.Adapted, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> pf.Adapter:
    """An adapter with noise in every leaf."""
    g = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: t + scale * torch.randn(t.shape, generator=g).to(dtype), net.init(seed, dtype=dtype))


def state(model: nn.Module) -> list[Any]:
    """Everything that must not change: each tensor's identity, version and values, and each module's attributes."""
    found: list[Any] = []
    for name, m in model.named_modules(remove_duplicate=False):
        tensors = {**m._parameters, **m._buffers}
        found += [(name, k, id(t), t._version, t.detach().clone(), t.grad) for k, t in tensors.items() if t is not None]
        found.append((name, sorted(vars(m)), sorted(tensors), sorted(m._modules), id(m), m.training))
    return found


def same_state(a: list[Any], b: list[Any]) -> bool:
    def eq(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return len(a) == len(b) and all(len(x) == len(y) and all(map(eq, x, y)) for x, y in zip(a, b, strict=True))


def close(got: Tensor, want: Tensor, tol: float = 2e-5) -> None:
    assert isinstance(got, Tensor)
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert want.isfinite().all()
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs().max()
    assert error <= tol * max(1.0, float(want.abs().max())), f"off by {float(error):.3g}"


def trees_close(got: Any, want: Any, tol: float = 5e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        for key in want[name]:
            close(got[name][key], want[name][key], tol)


def call(model: nn.Module, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """functional_call with one name a slot: with two, torch leaves a shared submodule holding the given tensors."""
    slots = {(id(m), k): f"{p}.{k}" if p else k for p, m in model.named_modules() for k in m._parameters}
    return functional_call(
        model, {n: weights[n] for n in slots.values() if n in weights}, args, kwargs, tie_weights=False
    )


class Net(nn.Module):
    """A linear layer, called `f`, in a forward given as a function of the module and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: Any):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.body = nn.Linear(8, 8), nn.Linear(8, 8), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def randomised(model: nn.Module, seed: int = 3) -> nn.Module:
    """Every trained tensor moved from where it started, so that nothing in it is zero, one, or alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def compare(mine: Any, theirs: Any, bound: float = 2e-5) -> None:
    scale = max(1.0, float(theirs.detach().abs().max()))
    error = float((mine - theirs).detach().abs().max())
    assert error <= bound * scale, f"differs by {error:.3g} where values reach {scale:.3g}"


def rows_are_alone(index: Sequence[int], adapters: Sequence[Any], row: Any, rows: Any) -> None:
    """Row i of a batch is that row alone, in value and in the gradient of each adapter that one row uses.

    Args:
        index: the adapter of each row; −1 is the base.
        row: (adapter or None, i) ↦ the output of row i alone.
        rows: a stack of the adapters ↦ the output of the batch.
    """
    stack = pf.stack(adapters)
    want = torch.cat([row(adapters[k] if k >= 0 else None, i) for i, k in enumerate(index)])
    close(rows(stack), want, 1e-4)
    assert not torch.allclose(want, torch.cat([row(None, i) for i in range(len(index))]), atol=1e-4)
    slopes = grad(lambda s: rows(s).square().sum())(stack)
    for i, k in enumerate(index):
        if k >= 0:
            alone = grad(lambda a, i=i: row(a, i).square().sum())(adapters[k])  # type: ignore[misc]
            for site, leaf in alone.items():
                for key, g in leaf.items():
                    close(slopes[site][key][k], g, 1e-3)
