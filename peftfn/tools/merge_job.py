"""One merge: its arguments checked, and the walk over the sites."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.combine import add, scale
from peftfn.core.method import MATRIX, Leaf
from peftfn.core.plan import Adapter, Entry
from peftfn.core.rng import Rng
from peftfn.net.net import Adapted
from peftfn.tools.change import Change, as_loras, changes, check_energy, check_rank, leaf_of, nothing
from peftfn.tools.rules import Rule, with_bias
from peftfn.tools.spaces import SPACES, Back, shared

Pairs = Sequence[Any]
"""(net, adapter) pairs; what `load` returns is one."""
Space = Literal["dense", "core", "knots", "shared"]


class Job:
    """One merge: its arguments checked, and what is common to all."""

    def __init__(
        self,
        where: str,
        adapters: Pairs,
        weights: Sequence[float] | Tensor | None,
        rank: int | None,
        energy: float | None,
        seed: int = 0,
    ):
        self.where, self.rank, self.energy, self.seed = where, rank, energy, seed
        self.pairs = _pairs(where, adapters)
        self.weights = _weights(where, weights, len(self.pairs))
        self.plain = weights is None or not isinstance(weights, Tensor)
        if rank is not None and energy is not None:
            raise ValueError(f"{where}: rank is {rank} and energy is {energy}; give at most one of the two")
        check_energy(where, energy)
        self.sites = {n: e.site for net, _ in self.pairs for n, e in net.plan.items()}
        order = [n for n in self.pairs[0][0].weights if n in self.sites]
        self.sites = {n: self.sites[n] for n in dict.fromkeys([*order, *self.sites])}
        for name, site in self.sites.items():
            check_rank(name, site, rank)

    def single(self) -> list[Change]:
        """The changes of the one adapter, or none."""
        return list(changes(*self.pairs[0])) if len(self.pairs) == 1 else []

    def unchanged(self) -> tuple[Adapted, Adapter] | None:
        """The one adapter as it is, where its weight is 1 and no other rank is asked for."""
        alone = len(self.pairs) == 1 and self.plain and self.rank is None and self.energy is None
        if not alone or float(self.weights[0]) != 1:
            return None
        net, adapter = self.pairs[0]
        for _ in changes(net, adapter, ()):  # refuses what depends on the input
            pass
        return net, dict(adapter)

    def by(self, rule: Rule, space: Space, density: float, beta: float = 0.0) -> tuple[Adapted, Adapter]:
        """Merge by a rule for entries."""
        if not 0 < density <= 1:
            raise ValueError(f"{self.where}: density is {density}; it is a share of the entries: give 0 < density <= 1")
        if space not in (*SPACES, "shared"):
            raise ValueError(f"{self.where}: space is {space!r}; choose one of {[*SPACES, 'shared']}")
        if (beta and space != "shared") or not 0 <= beta <= 1:
            raise ValueError(f"{self.where}: beta is {beta}; it is for space='shared': give 0 <= beta <= 1 there")
        if density == 1 and (same := self.unchanged()):
            return same
        turn = self._space(space, beta)

        def site(name: str, cs: list[Change]) -> Change:
            stack, back = (SPACES["dense"] if cs[0].site.kind not in MATRIX else turn)(cs)
            rngs = [Rng(self.seed, f"{name}:{t}", device=stack.device) for t in range(len(cs))]
            out = back(rule(stack, self.weights.to(stack.device, stack.dtype), rngs))
            return with_bias(out, cs, lambda b: rule(b[:, None], self.weights.to(b), rngs)[0])

        return self.merged(site)

    def _space(self, space: Space, beta: float) -> Callable[[Sequence[Change]], tuple[Tensor, Back]]:
        """The space as a function. ValueError where it needs a rank that is not given."""
        if space == "shared":
            if self.rank is None:
                raise ValueError(
                    f"{self.where}: the shared space has the rank of the result, so that it wants rank=…, and no energy"
                )
            return partial(shared, self.rank, beta)
        full = [n for n, s in self.sites.items() if s.kind in MATRIX]
        if space == "dense" and self.rank is None and self.energy is None and full:
            raise ValueError(
                f"{self.where}: in the dense space the merged change of {full[0]} has full rank: give rank=… or "
                "energy=… for the nearest LoRA, or space='core' or 'knots', whose result has the sum of the ranks"
            )
        return SPACES[space]

    def merged(self, one: Callable[[str, list[Change]], Change], exact: bool = False) -> tuple[Adapted, Adapter]:
        """Merge site by site. `exact`: whether a method that is linear in its tensors stays."""
        kept = self.closed() if exact and self.rank is None and self.energy is None else None
        if kept is not None:
            return kept
        streams = [changes(net, a, [n for n in self.sites if n in net.plan]) for net, a in self.pairs]
        leaves: dict[str, Leaf] = {}
        for name, site in self.sites.items():
            here = [next(s) if name in net.plan else None for s, (net, _) in zip(streams, self.pairs, strict=True)]
            like = next(c for c in here if c is not None)
            mine = [nothing(site, like.matrix() if like.up is None else like.up) if c is None else c for c in here]
            leaves[name] = leaf_of(one(name, mine), self.rank, self.energy)
        return as_loras(self.pairs[0][0].model, leaves)

    def closed(self) -> tuple[Adapted, Adapter] | None:
        """The sum as an adapter of the first net, where all plans are its own and each method has a closed form."""
        net = self.pairs[0][0]
        if net.plan.banks or not all(_same(net, other) for other, _ in self.pairs):
            return None
        tree = add(*(scale(a, w) for (_, a), w in zip(self.pairs, self.weights, strict=True)))
        weights, out = net.weights, {}
        for name, entry in net.plan.items():
            leaf = _closed(entry, tree[name], entry.site.canonical(weights[name]))
            if leaf is None:
                return None
            out[name] = leaf
        return net, out


def _closed(entry: Entry, tree: Mapping[str, Any], w: Tensor) -> Leaf | None:
    """The leaf that a sum comes to, or None where it is none of the method's own."""
    if not entry.method.mergeable or entry.prepares:
        return None
    method, p = entry.tensors(tree, {}, w)
    if method != entry.method or any(p[k].shape != shape for k, shape in entry.spec.items()):
        return None
    return {k: p[k] for k in entry.spec}


def _same(a: Adapted, b: Adapted) -> bool:
    """Whether two nets have the same plan: sites, methods and constants."""
    if a is b:
        return True
    return a.plan.keys() == b.plan.keys() and all(
        e.method == b.plan[n].method
        and e.frozen.keys() == b.plan[n].frozen.keys()
        and all(torch.equal(t, b.plan[n].frozen[k]) for k, t in e.frozen.items())
        for n, e in a.plan.items()
    )


# Arguments.


def _pairs(where: str, adapters: Pairs) -> list[tuple[Adapted, Mapping[str, Any]]]:
    if isinstance(adapters, Mapping | Adapted) or not isinstance(adapters, Sequence):
        raise TypeError(f"{where}: give a list of (net, adapter) pairs, not {type(adapters).__name__}")
    pairs = []
    for i, pair in enumerate(adapters):
        try:
            net, adapter = pair
        except (TypeError, ValueError):
            raise TypeError(f"{where}: adapters[{i}] is a {type(pair).__name__}; give (net, adapter) pairs") from None
        if not isinstance(net, Adapted) or not isinstance(adapter, Mapping):
            seen = f"({type(net).__name__}, {type(adapter).__name__})"
            raise TypeError(f"{where}: adapters[{i}] is {seen}; give (net, adapter) pairs")
        net.plan.check(adapter)
        pairs.append((net, adapter))
    if not pairs:
        raise ValueError(f"{where}: give at least one (net, adapter) pair")
    for i, (net, _) in enumerate(pairs):
        if net.model is not pairs[0][0].model:
            raise ValueError(
                f"{where}: adapters 0 and {i} are of two models; load or adapt both on one, since a change of one "
                "base's weights means nothing to another's"
            )
    return pairs


def _weights(where: str, weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    t = torch.ones(count) if weights is None else torch.as_tensor(weights)
    if t.shape != (count,):
        raise ValueError(f"{where}: weights have shape {list(t.shape)}; give one for each of {count} adapters")
    t = t if t.is_floating_point() else t.float()
    if not t.isfinite().all():
        raise ValueError(f"{where}: weights are {t.tolist()}; give finite numbers")
    return t
