"""What the sites of a view are told of the call that runs: the token ids, where methods act on some tokens alone."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peftfn.net.run import copies_of
from peftfn.slots.acting import Ids, named, weights
from peftfn.slots.gates import Gates
from peftfn.tensors.sequence import Steps
from peftfn.tensors.transform import inference
from peftfn.view.choice import Choice


class Told:
    """One call of a view, or all forward passes of one `generate`."""

    def __init__(self, ids: Ids, copies: int, steps: Steps | None):
        """copies: how often each row is repeated. steps: of a `generate`."""
        self.ids, self.copies, self.steps = ids, copies, steps
        self.made: dict[Any, Gates] = {}

    def gates(self, site: str, kinds: Sequence[tuple[Any, int]]) -> Gates:
        """Where adapters of these methods act at a site. kinds: as of `weights`."""
        key = tuple(kinds), inference()
        if key not in self.made:
            self.made[key] = weights(self.ids, site, kinds, self.copies, self.steps)
        return self.made[key]


@contextmanager
def telling(choice: Choice, told: Any) -> Iterator[None]:
    """While the block runs, the sites know this of the call."""
    here, before = choice.here, choice.here.told
    here.told = told
    try:
        yield
    finally:
        here.told = before


def listening(cls: Any, forward: Callable[..., Any]) -> dict[str, Any]:
    """What the class of a view has, some of whose adapters act on some tokens alone. forward: without that."""

    names = tuple(n for n in inspect.signature(forward).parameters if n != "self")

    def told_of(self: Any, args: Any, kwargs: Any, method: str | None = None) -> Told | None:
        """What the sites are told; None if all active adapters act on all tokens. ValueError if nobody can know."""
        state = self._peftfn
        plans = [state.plans[name] for name in state.choice.active.names if state.plans[name].gated]
        if not plans:
            return None
        ids, copies = Ids(self, names, args, kwargs, method), copies_of(self, method, args, kwargs)
        told = Told(ids, copies, None if method is None else Steps())
        for plan in plans:
            for site in plan.gated:  # before anything runs
                told.ids.acted_on(site, (plan.entries if self.training else plan.meant)[site].method)
        return told

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        choice = self._peftfn.choice
        told = choice.here.told
        if told is not None and told.steps is not None:  # one of the forward passes of `generate`
            told.steps.begin(named(names, args, kwargs))
            return forward(self, *args, **kwargs)
        with telling(choice, told_of(self, args, kwargs)):
            return forward(self, *args, **kwargs)

    body: dict[str, Any] = {"forward": run}
    if hasattr(cls, "generate"):

        @wraps(cls.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            with telling(self._peftfn.choice, told_of(self, args, kwargs, "generate")):
                return cls.generate(self, *args, **kwargs)

        body["generate"] = generate
    return body
