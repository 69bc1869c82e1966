"""AdapterFusion: attention over what several trained adapters add, anew for each token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import Bottleneck
from peftfn.model.place import Place

OWN = ("query", "query_bias", "key", "key_bias", "value")
"""What attends; the rest of a leaf are the adapters."""


@dataclass(frozen=True)
class AdapterFusion(ModuleMethod):
    """y + Σ_k a_k V u_k with a = softmax_k((Q y + c) · (K u_k + e)), u_k = f_k(y) − y what adapter k of n adds to y.

    Q, K, V [d, d] are trained and the adapters f_k are meant not to be: train the `OWN` tensors alone. `fused` makes a
    leaf of trained adapters. V starts as the identity (1e-6 off its diagonal), Q and K normal with deviation 0.02.

    Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, arXiv:2005.00247.

    Trainable parameters per site: 3·d² + 2·d, and n times those of the adapters. Use it to combine adapters of several
    tasks for a new one.

    Args:
        n: adapters.
        of: their method: a `Bottleneck`.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        each = pf.adapt(model, {"0": pf.Bottleneck(2)})
        method = pf.AdapterFusion(2, of=pf.Bottleneck(2))
        net = pf.adapt(model, {"0": method})
        leaf = method.fused(net.init()["0"], [each.init(seed=1)["0"], each.init(seed=2)["0"]])
        y = net.apply({"0": leaf}, torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = ({"n": 2, "of": Bottleneck(2)}, {"n": 3, "of": Bottleneck(1, of="input", scale=0.5)})

    n: PositiveInt = 2
    of: ModuleMethod = field(default_factory=Bottleneck)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.of) is not Bottleneck:
            raise ValueError(f"AdapterFusion.of is {self.of}; give the method of the adapters, a Bottleneck")

    @property
    def identity(self) -> bool:
        return self.of.identity

    def eval(self) -> Self:
        return replace(self, of=self.of.eval())

    def init(self, rng: Rng, m: Place) -> Leaf:
        leaves = [self.of.init(rng, m) for _ in range(1 if rng.meta else self.n)]  # shapes need not be drawn n times
        stack = {k: torch.stack([leaf[k] for leaf in leaves]).expand(self.n, *t.shape) for k, t in leaves[0].items()}
        d = stack["b"].shape[-1]
        eye = torch.eye(d, dtype=rng.dtype, device=rng.device)
        attends = {k: rng.normal(d, d, std=0.02) for k in ("query", "key")}
        return {**stack, **attends, **{f"{k}_bias": rng.zeros(d) for k in attends}, "value": eye + 1e-6 * (1 - eye)}

    def fused(self, leaf: Leaf, adapters: Sequence[Leaf]) -> Leaf:
        """Return the leaf with these n adapters of the site, leaves of `of`, in place of its own."""
        if len(adapters) != self.n:
            raise ValueError(f"{len(adapters)} adapters are given, and {self} fuses {self.n}: give as many")
        return {k: t if k in OWN else torch.stack([a[k] for a in adapters]) for k, t in leaf.items()}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        adapters = {k: t for k, t in p.items() if k not in OWN}
        u = vmap(lambda q: self.of.after(q, m, x, y) - y, out_dims=-2, randomness="different")(adapters)  # [..., n, d]
        query, key = F.linear(y, p["query"], p["query_bias"]), F.linear(u, p["key"], p["key_bias"])
        a = torch.softmax((key * query.unsqueeze(-2)).sum(-1), -1)
        return y + F.linear((a.unsqueeze(-1) * u).sum(-2), p["value"])
