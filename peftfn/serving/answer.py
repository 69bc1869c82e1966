"""An answer on its way from the engine's thread to whoever asked, who may go away at any time."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.concurrency import run_in_threadpool

from peftfn.serving.asked import Asked
from peftfn.serving.engine import Engine
from peftfn.serving.fields import Refused
from peftfn.serving.metrics import Metrics
from peftfn.serving.ticket import Full, Piece, Stopped, Ticket
from peftfn.serving.told import Told, error


class Failed(Exception):
    """The engine could not answer."""


class Gone(Exception):
    """Whoever asked went away."""


class Answer:
    """One request on its way: the pieces come from the engine's thread into a queue of the event loop. Each one of a
    stream; those of a whole answer together, since to wake the loop for each token takes time from all answers."""

    def __init__(self, engine: Engine, metrics: Metrics, wanted: Asked, began: float):
        self._engine, self._metrics, self._wanted, self._began = engine, metrics, wanted, began
        self._told, self._pieces = Told(wanted), asyncio.Queue[list[Piece] | None]()
        self._ticket: Ticket | None = None
        self._any = self._ended = False  # whether there are tokens; whether there will be no more

    async def submitted(self) -> None:
        """Put the request into the engine's queue. Refused where it takes none."""
        loop, held = asyncio.get_running_loop(), list[Piece]()

        def sink(piece: Piece) -> None:  # in the engine's thread
            self._measure(piece)
            held.append(piece)
            if self._wanted.stream or piece.finish is not None or piece.error is not None:
                loop.call_soon_threadsafe(self._pieces.put_nowait, held.copy())
                held.clear()

        try:
            self._ticket = await run_in_threadpool(self._engine.submit, self._wanted.ask, sink)
        except Full as e:
            raise Refused(429, str(e), code="queue_full", retry=e.seconds) from e
        except Stopped as e:
            raise Refused(503, str(e)) from e
        except KeyError as e:
            raise Refused(404, f"{e.args[0]}; GET /v1/models lists them", "model", "model_not_found") from e
        except ValueError as e:
            raise Refused(400, str(e), "model") from e
        self._metrics.prompt.inc(len(self._wanted.ask.prompt))

    async def watch(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """End the answer when whoever asked goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait(None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces. Failed where the engine fails, Gone where nobody waits any more."""
        while not self._ended:
            several = await self._pieces.get()
            if several is None:
                raise Gone
            for piece in several:
                if piece.error is not None:
                    self._end("failed")
                    raise Failed(piece.error)
                self._told.count += len(piece.tokens)
                if piece.finish is not None:
                    self._end("answered")
                yield piece

    async def whole(self) -> dict[str, Any]:
        pieces = [piece async for piece in self.pieces()]
        text, ids = "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens]
        return self._told.whole(text, ids, pieces[-1].finish or "length")

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            for chunk in self._told.first():
                yield _event(chunk)
            async for piece in self.pieces():
                for chunk in self._told.piece(piece.text, piece.tokens, piece.finish):
                    yield _event(chunk)
            for chunk in self._told.last():
                yield _event(chunk)
        except Failed as e:
            yield _event(error(500, str(e)))
        yield "data: [DONE]\n\n"

    def close(self) -> None:
        """Free the row, if the answer is not complete."""
        if not self._ended:
            self._end("cancelled")
            if self._ticket is not None:
                self._ticket.cancel()

    def _measure(self, piece: Piece) -> None:
        seconds = time.monotonic() - self._began
        if piece.tokens and not self._any:
            self._any = True
            self._metrics.first.observe(seconds)
        self._metrics.generated.inc(len(piece.tokens))
        if piece.finish is not None:
            self._metrics.whole.observe(seconds)

    def _end(self, outcome: str) -> None:
        self._ended = True
        self._metrics.requests.labels(outcome).inc()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
