"""chain: methods one after the other at one site."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Index, Leaf, Method, Product, Weight
from peftfn.core.modulechain import ModuleChain
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng


@dataclasses.dataclass(frozen=True)
class Chain(Weight):
    """W₀ = w, W_{i+1} = W_i + delta_i(p_i, W_i): methods one after the other at the same site. `chain` makes it.

    Each method sees the weight after the former ones, so the order matters: `chain(LoRA(), OFT(…))` rotates the
    low-rank change too, `chain(OFT(…), LoRA())` does not.

    Args:
        methods: at least one method; none of them may share tensors among sites (`shared`, `bank`).

    Raises:
        TypeError: an argument is not a method.
        ValueError: a method shares tensors among its sites, acts on some tokens alone, or depends on the input and is
            not the last.

    Example:
        method = pf.Chain((pf.LoRA(rank=2), pf.IA3()))
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": method})
    """

    methods: tuple[Weight, ...] = ()
    cases: ClassVar = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for m in self.methods:
            if not isinstance(m, Weight):
                raise TypeError(f"chain: {m!r} is not a method; give methods, like peftfn.LoRA(rank=8)")
            if m.overrides("shared") or m.overrides("bank"):
                raise ValueError(
                    f"chain: {m} shares tensors among its sites, which a chain cannot; give it a separate rule"
                )
            if m.overrides("acts_on"):
                raise ValueError(
                    f"chain: {m} acts on some tokens alone, which a chain cannot; use a net of its own, and pf.Nets"
                )
        for m in self.methods[:-1]:
            if not m.mergeable:
                raise ValueError(
                    f"chain: {m} depends on the input and leaves no weight for the method after it: put it last"
                )

    def __str__(self) -> str:
        return f"chain({', '.join(map(str, self.methods))})"

    @property
    def kinds(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset.intersection(*(m.kinds for m in self.methods)) if self.methods else Weight.kinds

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return all(m.mergeable for m in self.methods)

    @property
    def identity(self) -> bool:
        return all(m.identity for m in self.methods)

    def _part(self, p: Mapping[str, Tensor], i: int) -> Leaf:
        return {k.partition(".")[2]: v for k, v in p.items() if k.startswith(f"{i}.")}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {f"{i}.{k}": t for i, m in enumerate(self.methods) for k, t in m.init(rng, w).items()}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {f"{i}.{k}": t for i, m in enumerate(self.methods) for k, t in m.frozen(rng, w).items()}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index | Tensor]:
        return {f"{i}.{k}": x for i, m in enumerate(self.methods) for k, x in m.indices(self._part(p, i), w).items()}

    @property
    def exact_gradient(self) -> bool:
        return all(m.exact_gradient for m in self.methods)

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        out: Leaf = {}
        for i, m in enumerate(self.methods):
            q = m.prepare(self._part(p, i), w)
            out |= {f"{i}.{k}": t for k, t in q.items()}
            if any(later.overrides("prepare") for later in self.methods[i + 1 :]):
                w = w.to(torch.promote_types(w.dtype, torch.float32))
                w = w + m.delta(q, w)
        return out

    def _weight(self, p: Leaf, w: Tensor, n: int) -> Tensor:
        """The weight after the first n methods."""
        for i, m in enumerate(self.methods[:n]):
            w = w + m.delta(self._part(p, i), w)
        return w

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self._weight(p, w, len(self.methods)) - w

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        for i, m in enumerate(self.methods):
            b = m.bias(self._part(p, i), b)
        return b

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if not self.methods:
            return dot(x, w)
        n = len(self.methods) - 1
        return self.methods[n].product(self._part(p, n), self._weight(p, w, n).to(w.dtype), x, dot)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if not self.methods:
            return F.linear(x, w)
        n = len(self.methods) - 1
        return self.methods[n].linear(self._part(p, n), self._weight(p, w, n).to(w.dtype), x)

    def eval(self) -> "Chain":
        return Chain(tuple(m.eval() for m in self.methods))


Some = TypeVar("Some", bound=Method)


def chain(*methods: Some) -> Some:
    """Return a method that applies the given ones in order at one site; see `Chain`, and `ModuleChain` for modules.

    Args:
        methods: at least one, all of one family. Chains among them are flattened; a single method is returned
            unchanged.

    Returns:
        A method for the rules of `adapt`.

    Raises:
        TypeError: an argument is not a method.
        ValueError: a method shares tensors among its sites, acts on some tokens alone, or depends on the input and is
            not the last.

    Example:
        method = pf.chain(pf.LoRA(rank=2), pf.IA3())
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": method})
    """
    chains = (Chain, ModuleChain)
    flat: tuple[Any, ...] = tuple(part for m in methods for part in (m.methods if isinstance(m, chains) else (m,)))
    if len(flat) == 1 and isinstance(flat[0], Method):
        return flat[0]  # type: ignore[return-value]
    cls: Any = ModuleChain if flat and isinstance(flat[0], ModuleMethod) else Chain
    return cls(flat)  # type: ignore[no-any-return]
