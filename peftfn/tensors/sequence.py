"""Token ids [rows, tokens], and which positions of a sequence a tensor has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.tensors.cache import cache_in


def from_last(ids: Tensor, sought: Sequence[int]) -> Tensor:
    """[rows, tokens]: 1 from the first token of the last occurrence of `sought` on, else 0."""
    rows, tokens = ids.shape
    if len(sought) > tokens:
        return torch.zeros(rows, tokens, device=ids.device)
    wanted = torch.as_tensor(sought, device=ids.device)
    here = (ids.unfold(1, len(sought), 1) == wanted).all(-1)  # [rows, starts]
    here = F.pad(here, (0, tokens - here.shape[1]))
    later = here.flip(1).cumsum(1).flip(1) - here.long()  # occurrences after each position
    return (here & (later == 0)).cumsum(1).float()


def held_by(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it does not say."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return None if length is None else int(length())


class Steps:
    """Which positions of its sequence the forward pass has that runs now, in a method that runs several of them.

    A forward pass of `generate` has the tokens that the cache does not hold yet.
    """

    def __init__(self) -> None:
        self.now: tuple[int, int] | None = None  # (the first position, how many); None: nobody knows
        self.made: dict[Any, Tensor | None] = {}

    def begin(self, given: Mapping[str, Any]) -> None:
        """A forward pass begins. given: its arguments by name."""
        self.made.clear()
        if torch.compiler.is_compiling():  # a number of a cache would be a constant of the code
            self.now = None
            return
        tokens = next((t for k in ("input_ids", "inputs_embeds") if isinstance(t := given.get(k), Tensor)), None)
        start = None if (cache := cache_in(given)) is None else held_by(cache)
        known = tokens is not None and tokens.dim() > 1 and start is not None
        self.now = (start, tokens.shape[1]) if known else None  # type: ignore[assignment,union-attr]

    def positions(self, tokens: int, length: int, device: torch.device | None = None) -> Tensor | None:
        """The positions that a tensor of so many tokens has in what is known of a sequence, its first `length` tokens;
        the last of them for those that come later. None if it has all of them, or is no tensor of this pass."""
        key = tokens, length, device
        if key not in self.made:
            self.made[key] = self._positions(*key)
        return self.made[key]

    def _positions(self, tokens: int, length: int, device: torch.device | None) -> Tensor | None:
        start, many = self.now or ((length - 1, 1) if tokens == 1 else (0, max(tokens, length)))
        if tokens == 1:  # of a head that is asked for the last token alone, it may be
            start, many = start + many - 1, 1
        if tokens != many or not length or (start, many) == (0, length):
            return None
        return torch.arange(start, start + many, device=device).clamp(max=length - 1)

    @contextmanager
    def _during(self, root: nn.Module) -> Iterator[None]:
        handle = root.register_forward_pre_hook(lambda _, args, kwargs: self.begin(kwargs), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def during(self, root: nn.Module) -> AbstractContextManager[None]:
        """What surrounds a method of the model that runs forward passes: they call it by keyword."""
        return nullcontext() if torch.compiler.is_compiling() else self._during(root)
