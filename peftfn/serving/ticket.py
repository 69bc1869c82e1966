"""A request in the engine: what it asks, the pieces of its answer, and where they go."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftfn.serving.sampling import GREEDY, Sampling, generator
from peftfn.serving.text import Text

_log = logging.getLogger("peftfn.serving")


class Full(Exception):
    """The queue is full. `seconds`: when to try again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} requests wait already, as many as the queue holds: try again in {seconds} seconds")
        self.seconds = seconds


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Ask:
    """A request.

    Args:
        prompt: token ids, at least one.
        adapter: its name; None: the base.
        max_tokens: of the answer.
        sampling: how tokens are drawn.
        stops: texts that end the answer; they need a tokenizer.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_tokens: int = 16
    sampling: Sampling = GREEDY
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer: the token ids and the text that are new. The last one has a `finish`, "stop" or "length", or
    an `error`."""

    tokens: Sequence[int] = ()
    text: str = ""
    finish: str | None = None
    error: str | None = None


class Ticket:
    """A request in the engine. Its pieces go to the sink, in the engine's thread."""

    def __init__(self, ask: Ask, key: str, sink: Callable[[Piece], None], text: Text | None):
        self.ask, self.key, self.text, self._sink = ask, key, text, sink
        self.out: list[int] = []
        self.source = generator(ask.sampling)
        self.began = 0.0
        self.tries = 0  # how often a pass that it was in has failed
        self.done = self.cancelled = False

    def cancel(self) -> None:
        """Give the row or the place in the queue to another request; no more pieces come. Nothing, if it is done."""
        self.cancelled = True

    def give(self, piece: Piece) -> None:
        try:
            self._sink(piece)
        except Exception:  # whoever asked is gone, and took the means to be told along
            _log.debug("a request's sink raised", exc_info=True)
            self.cancelled = True
