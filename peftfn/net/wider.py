"""A call that runs once more: what it has to find as it was."""

from collections.abc import Mapping, Sequence
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
        for kind in {t.device.type for t in tensors(self.given)} - {"cpu", "meta"}:
            there = torch.get_device_module(kind)
            if not getattr(there, "is_current_stream_capturing", bool)():  # a captured graph draws its own numbers
                self.numbers.append((there.set_rng_state, there.get_rng_state()))

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
