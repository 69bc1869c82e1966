"""A call that runs once more: what it has to find as it was."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
