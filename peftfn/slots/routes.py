"""Gates that are not one tensor: other ones at each site, made of each site's input, or anew for each forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftfn.model.names import matches, near
from peftfn.slots.gates import Gates, Weights


@dataclass(frozen=True)
class PerForward:
    """Gates for `net.gated` that are made anew for each forward pass: once a call, once a step of `generate`.

    Args:
        function: what the model is called with in one forward pass ↦ gates, in any form that `net.gated` takes.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack([net.init(seed=0), net.init(seed=1)])
        gates = pf.PerForward(lambda x: torch.softmax(x[:, :2], -1))
        y = net.gated(many, gates, torch.randn(3, 8))
    """

    function: Callable[..., Any]


Gating = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[str, Tensor], Tensor] | PerForward
"""What `net.gated` takes for gates."""


def of(gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> Gates:
    """The gates that a caller means, in any form. ValueError where they fit neither the adapters nor the inputs."""
    if isinstance(gates, PerForward):
        if not stepwise:
            args, kwargs = inputs
            return of(gates.function(*args, **kwargs), count, inputs, copies)
        return Deferred(count, gates.function)
    if isinstance(gates, Mapping):
        return Sites.of(gates, count, inputs, copies, stepwise)
    if callable(gates) and not isinstance(gates, Tensor):
        return Router(count, gates)
    return Weights.of(gates, count, inputs, copies, stepwise)


@dataclass(frozen=True, eq=False)
class Sites(Gates):
    """Each site has gates of its own: those of the first pattern that matches its name."""

    patterns: Mapping[str, Gates]
    at_site: Mapping[str, Gates] = field(default_factory=dict)

    @classmethod
    def of(cls, gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Sites":
        if not gates:
            raise ValueError("gated: the mapping of gates is empty; give {pattern: gates} for every site")
        for pattern, g in gates.items():
            if isinstance(g, PerForward | Mapping):
                raise ValueError(
                    f"gated: the gates of {pattern!r} are a {type(g).__name__}; a mapping has tensors or functions of "
                    "(site, x): put the PerForward around the mapping"
                )
        made = {pattern: of(g, count, inputs, copies, stepwise) for pattern, g in gates.items()}
        own = next(iter(made.values())).inputs
        return cls(count, made, inputs=own, copies=copies)

    def bound(self, common: Sequence[str] | None, sites: Iterable[str]) -> Self:
        names = list(sites)
        taken = {n: next((p for p in self.patterns if matches(p, n)), None) for n in names}
        for name, pattern in taken.items():
            if pattern is None:
                raise ValueError(
                    f"gated: no pattern of the gates matches {name}{near(name, list(self.patterns))}: give gates for "
                    "every site, zeros where the base is meant"
                )
        for pattern in self.patterns.keys() - set(taken.values()):
            raise ValueError(f"gated: {pattern!r} takes none of the {len(names)} sites{near(pattern, names)}")
        out = replace(self, at_site={n: self.patterns[p] for n, p in taken.items() if p is not None})
        return super(Sites, out).bound(common, names)

    @property
    def size(self) -> int | None:
        return next((n for g in self.patterns.values() if (n := g.size) is not None), None)

    @property
    def tokens(self) -> int | None:  # type: ignore[override]
        return next((n for g in self.patterns.values() if (n := g.tokens) is not None), None)

    @property
    def sealed(self) -> bool:
        return all(g.sealed for g in self.patterns.values())

    def site(self, name: str) -> Gates:
        return self.passed_to(self.at_site[name]).site(name)


@dataclass(frozen=True, eq=False)
class Router(Gates):
    """Gates that a function makes of the input of each site: (site, x) ↦ [rows, adapters], [rows, tokens, adapters]."""

    function: Callable[[str, Tensor], Tensor]
    name: str = ""
    made: dict[str, Gates] = field(default_factory=dict, kw_only=True)  # what the last input made, for the bias

    sealed = False  # type: ignore[assignment]

    @property
    def size(self) -> int | None:
        """None: its gates have whatever rows the input has."""
        return None

    def site(self, name: str) -> "Router":
        return replace(self, name=name, made={})

    def here(self, x: Tensor | None, what: str) -> Gates:
        if x is None:
            if not self.made:
                raise ValueError(
                    f"{self.name}: {what} has no input of its own, and the gates are a function of a site's input: "
                    "leave this site out of the rules, or give gates that are tensors"
                )
            return self.made["last"]
        g = self.function(self.name, x)
        if not isinstance(g, Tensor) or not g.is_floating_point() or not 1 <= g.dim() <= 3 or g.shape[-1] != self.count:
            shape = f"a {g.dtype} tensor {list(g.shape)}" if isinstance(g, Tensor) else f"a {type(g).__name__}"
            raise ValueError(
                f"{what}: the function of gates returns {shape}; return floating-point gates of {self.count} adapters, "
                "[adapters], [rows, adapters] or [rows, tokens, adapters]"
            )
        if g.dim() > 1 and g.shape[:-1] != x.shape[: g.dim() - 1]:
            raise ValueError(
                f"{what}: the function of gates returns {list(g.shape)} for an input {list(x.shape)}: its first "
                "dimensions are the input's rows, or rows and tokens"
            )
        self.made["last"] = Weights(self.count, g, (None,) * self.count, fixed=self.fixed, common=self.common)
        return self.made["last"]


@dataclass(frozen=True, eq=False)
class Deferred(Gates):
    """The gates of the forward pass that runs now, in a method that runs several."""

    function: Callable[..., Any]
    name: str = ""
    sites: tuple[str, ...] = ()
    held: dict[str, Gates] = field(default_factory=dict, kw_only=True)
    sealed = False  # type: ignore[assignment]

    def bound(self, common: Sequence[str] | None, sites: Iterable[str]) -> Self:
        names = tuple(sites)
        return super(Deferred, replace(self, sites=names)).bound(common, names)

    @property
    def now(self) -> Gates:
        return replace(self.held["now"], fixed=self.fixed, common=self.common, call=self.call).site(self.name)

    @property
    def size(self) -> int | None:
        return self.now.size if self.held else None

    @property
    def tokens(self) -> int | None:  # type: ignore[override]
        return self.now.tokens if self.held else None

    def of_positions(self, owner: Tensor, tokens: int | None) -> Gates:
        return self.now.of_positions(owner, tokens)

    def site(self, name: str) -> "Deferred":
        return replace(self, name=name)

    def at(self, rows: int) -> Gates | None:
        return self.now.at(rows)

    def here(self, x: Tensor | None, what: str) -> Gates:
        return self.now.here(x, what)

    @contextmanager
    def _during(self, root: nn.Module) -> Iterator[None]:
        def make(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.held["now"] = of(self.function(*args, **kwargs), self.count, (args, kwargs)).bound(None, self.sites)

        handle = root.register_forward_pre_hook(make, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.held.clear()

    def during(self, root: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else self._during(root)
