"""One method on one tiny model: what each law is about, and how tensors are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.core.method import Weight
from peftfn.tensors.tree import leaves as leaves
from peftfn.testing.models import ALIKE, AROUND, INPUTS, MODELS, SEVERAL, Model, of_ids

SITE, PLACE = "layer.weight", "layer"


@dataclass(frozen=True)
class Case:
    """One method on one tiny model, with inputs and random leaves."""

    method: Any  # a Method
    model_name: str = "linear"
    seed: int = 0
    rows: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> Model:
        kind = (MODELS | AROUND | INPUTS | SEVERAL | ALIKE)[self.model_name]
        return of_ids(kind) if self.gated else kind

    @property
    def gated(self) -> bool:
        """Whether the method acts on some tokens alone."""
        return isinstance(self.method, Weight) and self.method.overrides("acts_on")

    @property
    def site(self) -> str:
        """The name of the interesting site."""
        return SITE if self.method.adapts == "parameter" else PLACE

    @property
    def rule(self) -> str:
        """The pattern that finds the model's sites: `site`, and those beside it."""
        several = r"^(layer|more\.\d+)" + self.site.removeprefix("layer").replace(".", r"\.") + "$"
        return self.site if self.model_name in MODELS | AROUND | INPUTS else several

    @property
    def merges(self) -> bool:
        """Whether the method has a `delta`."""
        return isinstance(self.method, Weight) and self.method.mergeable

    @cached_property
    def model(self) -> nn.Module:
        return self.kind.build(self.seed, self.dtype)

    @cached_property
    def x(self) -> Tensor:
        return self.kind.x(self.rows, self.seed, self.dtype)

    @cached_property
    def net(self) -> pf.Adapted:
        return pf.adapt(self.model, {self.rule: self.method}, seed=self.seed)

    def adapter(self, seed: int = 0) -> pf.Adapter:
        """Leaves away from their initial values, in fp32 (fp64 for an fp64 model)."""
        return shaken(
            self.net.init(self.seed + seed, dtype=torch.promote_types(self.dtype, torch.float32)), self.seed + seed
        )

    def loss(self, adapter: pf.Adapter, x: Tensor | None = None) -> Tensor:
        y = self.net.apply(adapter, self.x if x is None else x)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().mean()


def shaken(tree: Any, seed: int, size: float = 0.3) -> Any:
    """The tree with N(0, size²) added to every tensor."""
    g = torch.Generator().manual_seed(seed + 17)

    def walk(t: Any) -> Any:
        if isinstance(t, dict):
            return {k: walk(v) for k, v in t.items()}
        return t + size * torch.randn(t.shape, generator=g, dtype=torch.float32).to(t.dtype)

    return walk(tree)


def dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(a[n][k] * b[n][k]).sum() for n in a for k in a[n]]).sum()


def close(got: Any, want: Any, what: str, rtol: float = 1e-4) -> None:
    """Finite, of one shape and dtype, and equal to rtol of the largest entry of `want`."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), f"{what}: {sorted(got)} instead of {sorted(want)}"
        for k in want:
            close(got[k], want[k], f"{what}/{k}", rtol)
        return
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.shape} {got.dtype} for {want.shape} {want.dtype}"
    )
    assert got.isfinite().all(), f"{what}: not finite"
    assert want.isfinite().all(), f"{what}: the reference is not finite"
    if not want.numel():
        return
    error, size = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    assert error <= rtol * max(size, 1.0), f"{what}: differs by {error:.3g} where values reach {size:.3g}"


def refused(f: Callable[..., Any], *args: Any, naming: str) -> None:
    """AssertionError unless f(*args) is a ValueError that names the site."""
    try:
        f(*args)
    except ValueError as e:
        assert f"{naming}: " in str(e), f"the error names no site: {e}"
        return
    raise AssertionError(f"no ValueError from {getattr(f, '__name__', f)}, which has no meaning here")


def runs_in(c: Case, dtype: torch.dtype) -> bool:
    """Whether this torch runs the base layer itself in this dtype."""
    try:
        c.model(c.x)
    except RuntimeError as e:
        assert "not implemented for" in str(e), e
        return False
    return True
