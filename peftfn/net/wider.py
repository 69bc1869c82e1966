"""A call whose sites lose the rows of a mixed batch runs once more, with rows followed through the whole model."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftfn.slots.routed import routed_of
from peftfn.slots.tags import RowsLost
from peftfn.tensors.arguments import tensors, visit

_VALUES = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Before:
    """The arguments of a call and the random numbers, as they were before it.

    A call whose site lost the rows of a mixed batch has run in part: it may have drawn random numbers, and written to
    what it was given. Numbers are drawn again; where something was written to, or may have been (a cache, a streamer),
    the call cannot start anew.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.given: list[Any] = []
        visit((tuple(args), dict(kwargs)), self.given.append)
        self.versions = self._versions()
        self.numbers = [(torch.random.set_rng_state, torch.random.get_rng_state())]
        for d in dict.fromkeys(t.device for t in tensors(self.given) if t.device.type not in ("cpu", "meta")):
            module = torch.get_device_module(d)
            capturing = getattr(module, "is_current_stream_capturing", None)
            if capturing is None or not capturing():
                self.numbers.append((partial(module.set_rng_state, device=d), module.get_rng_state(d)))

    def _versions(self) -> list[int | None]:
        return [None if t.is_inference() else t._version for t in tensors(self.given)]

    def again(self) -> bool:
        """Whether the call can run as if it had not run before; the random numbers are then those of before."""
        plain = all(isinstance(v, _VALUES) or hasattr(v, "to_json_string") for v in self.given)  # or a configuration
        if not plain or None in self.versions or self._versions() != self.versions:
            return False
        for put, state in self.numbers:
            put(state)
        return True


class Wider:
    """What runs a runner's calls if its routed modules are not enough.

    told: somebody said which modules are routed, so no others are.
    """

    def __init__(self, runner: Any):
        self.runner, self.told = runner, False
        self._made: dict[tuple[str, ...], Any] = {}  # more routed modules → what runs with them
        self._whole: dict[Any, Sequence[str]] = {}  # calls in which a site has lost its rows ↦ all modules

    def run(self, call: Any) -> Any:
        """The runner's `run`, of a call with gates. If a site loses its rows, the call runs once more with the whole
        model routed, and so do later ones of that method."""
        key = call.method, call.gates.common is None
        if key in self._whole:
            return self.routing(self._whole[key]).run(call)
        if self.told or torch.compiler.is_compiling():
            return self.runner.run(call)
        before = Before(call.args, call.kwargs)
        try:
            return self.runner.run(call)
        except RowsLost as e:
            whole = routed_of(self.runner.model, [""])
            if (wider := self.routing(whole)) is self.runner or not before.again():
                raise
            try:
                out = wider.run(call)
            except RowsLost as more:
                raise RowsLost(f"{e.text} Followed through the whole model, they are lost too: {more}") from more
        self._whole[key] = whole
        return out

    def routing(self, modules: Sequence[str]) -> Any:
        """The runner with these modules routed too."""
        more = tuple(name for name in dict.fromkeys(modules) if name not in self.runner.routed)
        if not more:
            return self.runner
        if more not in self._made:
            self._made.setdefault(more, self.runner.routing(more))
        return self._made[more]
