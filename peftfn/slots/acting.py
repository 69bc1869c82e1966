"""Methods that act on some tokens alone (`acts_on`): where they act in a call, by its own token ids.

Their gates join those of the caller, site by site. What the caller says for each token is taken as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Plan
from peftfn.slots.gates import Gates, Index, Shaped, Weights
from peftfn.slots.routes import Sites
from peftfn.tensors.arguments import hidden, storages, tensors
from peftfn.tensors.cache import cache_in
from peftfn.tensors.sequence import Steps, held_by
from peftfn.tensors.transform import inference, under_transform


@dataclass(frozen=True, eq=False)
class Acting(Shaped):
    """The gates of a call in which some methods act on some tokens alone: each of their sites has gates of its own."""

    inner: Gates | None  # those of the other sites; None: one adapter acts there on all rows
    at_site: Mapping[str, Gates]

    @property
    def sealed(self) -> bool:
        return self.inner is None or self.inner.sealed

    def uses(self, start: int, size: int) -> bool:
        return self.inner is None or self.inner.uses(start, size)

    def site(self, name: str) -> Gates:
        held = self.at_site.get(name, self.inner)
        assert held is not None
        return self.passed_to(held).site(name)


Kinds = Sequence[tuple[Any, int]]
"""(a method, how many adapters of it) in the order of the adapters; None for a method that acts on all tokens."""


class Ids:
    """The token ids of a call, and where methods act on them."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        method: str | None = None,
    ):
        """names: of the arguments of the model's forward. method: another method of the model that is called."""
        compiling = torch.compiler.is_compiling()
        self.inputs: frozenset[int] = frozenset() if compiling else storages(tensors((args, kwargs)))
        given = named(names, args, kwargs)
        ids = given.get("input_ids")
        if ids is None and method == "generate":
            ids = kwargs.get("inputs", args[0] if args and isinstance(args[0], Tensor) else None)
        elif ids is None and "input_ids" not in names and args:  # a model that has its own name for them
            ids = args[0]
        is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() and ids.dtype != torch.bool
        self.tensor: Tensor | None = ids if is_ids else None
        two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.two = two if isinstance(two, bool) else False
        self.past = cache_in(given) if method is None else None
        self.made: dict[Any, Tensor] = {}

    def acted_on(self, site: str, method: Any) -> Tensor:
        """Where a method acts, [rows, tokens]. ValueError if nobody can know."""
        key = method, inference()
        if key not in self.made:
            self.made[key] = self._acted_on(site, method)
        return self.made[key]

    def _acted_on(self, site: str, method: Any) -> Tensor:
        ids = self.tensor
        if ids is None or self.two:
            why = (
                "the model has an encoder and a decoder, each with tokens of its own"
                if self.two
                else "this call has no input_ids [rows, tokens]"
            )
            raise ValueError(
                f"{site}: {method} acts on some tokens alone, those that the token ids of a call say, and {why}. Say "
                "for each token where it acts: net.gated(pf.stack([a]), gates, …) with gates [rows, tokens, adapters]"
            )
        g: Tensor = method.acts_on(ids)
        if g.shape != ids.shape or not g.is_floating_point():
            raise ValueError(
                f"{site}: {type(method).__name__}.acts_on returns a {g.dtype} tensor {list(g.shape)} for ids "
                f"{list(ids.shape)}: return floating-point gates of their shape"
            )
        self._check_past(site, method, g)
        return g

    def _check_past(self, site: str, method: Any, g: Tensor) -> None:
        """ValueError if a cache holds tokens that may have made the method act."""
        if self.past is None or hidden(g) or under_transform() or not (held := held_by(self.past)):
            return
        if not bool((odd := (g == 0).all(1)).any()):
            return
        raise ValueError(
            f"{site}: {method} acts on none of the {g.shape[1]} tokens of row {int(odd.nonzero()[0, 0])}, and the "
            f"cache holds {held} tokens before them: whether it acts since then, these ids do not say. Use generate, "
            "which knows all tokens; or say it for each token, net.gated(pf.stack([a]), gates, …) with gates [rows, "
            "tokens, adapters] of these tokens. For the base, use the model itself"
        )


def named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def alone(plan: Plan, ids: Ids, copies: int) -> Acting:
    """The gates of one adapter of a plan some of whose methods act on some tokens alone."""
    return _acting(None, [(plan, 0, 1)], ids, copies)


def joined(gates: Gates, given: Sequence[tuple[Plan, int, int]], ids: Ids) -> Gates:
    """The caller's gates, with those of methods that act on some tokens alone. given: of each plan, where its adapters
    start and how many they are."""
    sites = [name for plan, start, size in given if gates.uses(start, size) for name in plan.gated]
    if not sites or (gates.by_token and not isinstance(gates, Sites)):
        return gates
    return _acting(gates, given, ids, gates.copies)


def _acting(inner: Gates | None, given: Sequence[tuple[Plan, int, int]], ids: Ids, copies: int) -> Acting:
    at: dict[str, Gates] = {}
    made: dict[Any, Gates] = {}  # one object for all sites that have the same
    for site in dict.fromkeys(name for plan, _, _ in given for name in plan.gated):
        entries = [(plan.entries.get(site), size) for plan, _, size in given]
        kinds = [(e.method if e is not None and e.gated else None, size) for e, size in entries]
        here = inner.at_site[site] if isinstance(inner, Sites) else inner
        key = id(here), *kinds
        if key not in made:
            made[key] = _with(here, ids, site, kinds, copies)
        at[site] = made[key]
    shape = next((g.g.shape[:2] for g in at.values() if isinstance(g, Weights) and g.g.dim() == 3), None)
    if shape is None and ids.tensor is not None:
        shape = ids.tensor.shape
    common = None if inner is None else inner.common
    inputs = ids.inputs if inner is None else inner.inputs
    return Acting(
        sum(size for _, _, size in given),
        inner,
        at,
        shape=(int(shape[0]), int(shape[1])) if shape is not None else (inner.size or 0, inner.tokens or 0),  # type: ignore[union-attr]
        inputs=inputs,
        copies=copies,
        common=common,
    )


def weights(ids: Ids, site: str, kinds: Kinds, copies: int, steps: Steps | None = None) -> Weights:
    """Where adapters act at a site, each with gate 1."""
    g = _own(ids, site, kinds)
    return Weights(g.shape[-1], g, (None,) * g.shape[-1], inputs=ids.inputs, copies=copies, steps=steps)


def _own(ids: Ids, site: str, kinds: Kinds) -> Tensor:
    """Where each adapter acts, [rows, tokens, adapters]."""
    known = {m: ids.acted_on(site, m) for m, _ in kinds if m is not None}
    every = torch.ones_like(next(iter(known.values())))
    return torch.stack([every if m is None else known[m] for m, size in kinds for _ in range(size)], -1)


def _with(inner: Gates | None, ids: Ids, site: str, kinds: Kinds, copies: int) -> Gates:
    """The caller's gates at a site, times where the adapters act there."""
    if inner is None:
        return weights(ids, site, kinds, copies)
    if inner.by_token:
        return inner
    if isinstance(inner, Index):
        index = inner.index
        g = (index[:, None] == torch.arange(inner.count, device=index.device)).float()[:, None]
        active = tuple(map(_rows_of(inner), range(inner.count)))
    elif isinstance(inner, Weights):
        g, active = inner.g[..., None, :], inner.active
    else:
        raise ValueError(
            f"{site}: its method acts on some tokens alone, and the gates here are a function: give gates that are "
            "tensors, [adapters], [rows, adapters], or [rows, tokens, adapters] for each token"
        )
    own = _own(ids, site, kinds).to(g)
    return Weights(inner.count, g * own, active, inputs=inner.inputs, copies=copies)


def _rows_of(index: Index) -> Callable[[int], Tensor | None]:
    """adapter ↦ the rows that use it; None: all, or nobody knows."""

    def rows(k: int) -> Tensor | None:
        if index.known is None or all(i == k for i in index.known):
            return None
        return torch.tensor([row for row, i in enumerate(index.known) if i == k], device=index.index.device)

    return rows
