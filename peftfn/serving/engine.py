"""The engine: a bounded queue, and one thread that prefills what waits and takes every running row a token further."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import Condition, Thread
from time import monotonic
from typing import Any

import torch
from torch import nn

from peftfn.many.residents import BASE
from peftfn.serving.adapters import Adapters
from peftfn.serving.batch import Batch
from peftfn.serving.sampling import Defaults, choose
from peftfn.serving.text import Text
from peftfn.serving.ticket import Ask, Full, Piece, Stopped, Ticket

_STOPPED = "the server is stopping, or its engine has failed"
_log = logging.getLogger("peftfn.serving")


class Engine:
    """Answers requests of many adapters in one running batch, in a thread of its own.

    Args:
        model: a causal language model of transformers, in eval mode.
        adapters: of this model.
        tokenizer: None: answers are token ids.
        rows: requests that run at once.
        queue: requests that wait at most.
        prefill: tokens of prompts in one pass, padding included; a longer prompt has a pass of its own.

    Raises:
        TypeError, ValueError: the model cannot be served, or there are more rows than slots for adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        tokenizer: Any = None,
        *,
        rows: int = 16,
        queue: int = 256,
        prefill: int = 2048,
    ):
        if rows > adapters.slots:
            raise ValueError(
                f"serve: {rows} rows may use as many adapters, and there are {adapters.slots} slots: give at least as "
                "many slots (--resident) as rows (--rows)"
            )
        if model.training:
            raise ValueError("serve: the model is in training mode: call model.eval() first")
        self.defaults, self.stepper = Defaults.of(model), adapters.stepper
        if tokenizer is not None:
            tokenizer.encode("a")  # a first use may change its settings, which must not happen in two threads at once
        self.model, self.adapters, self.tokenizer = model, adapters, tokenizer
        self.rows, self.queue, self._prefill = rows, queue, prefill
        self._changed = Condition()
        self._waiting: deque[Ticket] = deque()
        self._tickets: list[Ticket] = []  # of the running rows, in the order of the batch
        self._batch = Batch()
        self._seconds = 1.0  # of a request from its first step to its last, averaged over the last ones
        self._coming = 0  # requests whose adapter is being loaded
        self._stopping = False
        self._thread = Thread(target=self._run, name="peftfn.serving", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue, with those whose adapter is being loaded."""
        return len(self._waiting) + self._coming

    @property
    def running(self) -> int:
        """Rows of the batch whose answers are not complete."""
        return sum(not t.done for t in tuple(self._tickets))

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, ask: Ask, sink: Callable[[Piece], None]) -> Ticket:
        """Put a request into the queue. An adapter that was not used yet is loaded first, which takes its time.

        Raises:
            Full: the queue is.
            KeyError, ValueError: as for `Adapters.acquire`; or a request without a prompt, or with stops and without
                a tokenizer.
            Stopped: after `close`.
        """
        if not ask.prompt or ask.max_tokens < 1:
            raise ValueError("a request needs at least one token in its prompt, and one to make")
        if ask.stops and self.tokenizer is None:
            raise ValueError("stop needs text, and the model has no tokenizer")
        with self._changed:
            self._room()
            self._coming += 1  # it has a place in the queue while its adapter is loaded
        text = None if self.tokenizer is None else Text(self.tokenizer, ask.prompt, ask.stops)
        try:
            key = BASE if ask.adapter is None else self.adapters.acquire(ask.adapter)
        except BaseException:
            with self._changed:
                self._coming -= 1
            raise
        ticket = Ticket(ask, key, sink, text)
        with self._changed:
            self._coming -= 1
            if not self._stopping:
                self._waiting.append(ticket)
                self._changed.notify_all()
                return ticket
        self._release(ticket)
        raise Stopped(_STOPPED)

    def close(self) -> None:
        """Stop after the step that runs; requests that are not finished get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _room(self) -> None:
        if not self.alive:
            raise Stopped(_STOPPED)
        if self.waiting >= self.queue:
            raise Full(self.waiting, min(60, max(1, math.ceil(self._seconds * self.waiting / self.rows))))

    # In the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._ready():
                    self._turn()
        except BaseException:
            _log.exception("the engine has failed")
            raise
        finally:
            with self._changed:
                self._stopping = True
                left = [t for t in (*self._tickets, *self._waiting) if not t.done]
                self._waiting.clear()
            for ticket in left:
                self._end(ticket, Piece(error="the server stopped before the answer was complete"))
            self._tickets = []

    def _ready(self) -> bool:
        """Wait for something to do. False: stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._tickets):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        """Leave out what was cancelled, prefill some of what waits, and make one token for each row."""
        try:
            self._swept()
            if group := self._admitted():
                self._began(group)
            self._swept()
            if self._tickets:
                self._step()
        except Exception as e:  # the cache may be half changed
            tickets, self._tickets, self._batch = self._tickets, [], Batch()
            self._failed([t for t in tickets if not t.done], e)

    def _swept(self) -> None:
        """Rows that are done or cancelled leave."""
        with self._changed:
            gone = [t for t in self._waiting if t.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        stay = [i for i, t in enumerate(self._tickets) if not (t.done or t.cancelled)]
        gone += [t for t in self._tickets if t.cancelled and not t.done]
        self._batch.keep_(stay)
        self._tickets = [self._tickets[i] for i in stay]
        for ticket in gone:
            self._end(ticket, None)

    def _admitted(self) -> list[Ticket]:
        """The first that waits, and others of about its length, as many as fit into rows and a pass."""
        with self._changed:
            room, longest = self.rows - len(self._tickets), 0
            group: list[Ticket] = []
            for ticket in self._waiting if room > 0 else ():
                n = len(ticket.ask.prompt) + len(ticket.out)
                if not group and ticket.tries:  # it was in a pass that failed: alone
                    group = [ticket]
                    break
                fits = n.bit_length() == longest.bit_length() and (len(group) + 1) * max(n, longest) <= self._prefill
                if not group or (fits and not ticket.tries):
                    group.append(ticket)
                    longest = max(n, longest)
                if len(group) == room:
                    break
            for ticket in group:
                self._waiting.remove(ticket)
        try:
            bad = self.adapters.fetch([t.key for t in group])
        except Exception as e:  # of a kind that no reader should raise
            _log.exception("adapters could not be read")
            bad = {t.key: f"{type(e).__name__}: {e}" for t in group if t.key != BASE}
        for ticket in [t for t in group if t.key in bad]:
            self._end(ticket, Piece(error=f"adapter {ticket.ask.adapter!r} cannot be read: {bad[ticket.key]}"))
        return [t for t in group if t.key not in bad]

    def _began(self, group: list[Ticket]) -> None:
        for ticket in group:
            ticket.began = ticket.began or monotonic()
        prompts = [[*t.ask.prompt, *t.out] for t in group]
        try:
            logits, batch = self.stepper.prefill(prompts, self._runner(group))
            tokens = self._chosen(logits, group)
        except Exception as e:
            return self._failed(group, e)
        self._tickets += group
        self._batch.join_(batch)
        return self._told(group, tokens)

    def _step(self) -> None:
        tickets = self._tickets
        logits = self.stepper.step_(self._batch, [t.out[-1] for t in tickets], self._runner(tickets))
        self._told(tickets, self._chosen(logits, tickets))

    def _chosen(self, logits: torch.Tensor, tickets: Sequence[Ticket]) -> list[int]:
        sampling, sources = [t.ask.sampling for t in tickets], [t.source for t in tickets]
        seen = [[*t.ask.prompt, *t.out] for t in tickets] if self.defaults.penalty != 1 else [()] * len(tickets)
        return choose(logits, sampling, sources, seen, self.defaults)

    def _runner(self, tickets: Sequence[Ticket]) -> Callable[..., Any]:
        keys, bank = [t.key for t in tickets], self.adapters.bank
        if bank is None or all(key == BASE for key in keys):
            return self.model
        return partial(bank.apply, keys, timeout=None)

    def _told(self, tickets: Sequence[Ticket], tokens: Sequence[int]) -> None:
        """Give each request its token; those that are complete get their last piece."""
        for ticket, token in zip(tickets, tokens, strict=True):
            ticket.out.append(token)
            try:
                piece = self._piece(ticket, token)
            except Exception as e:  # of the tokenizer
                _log.exception("a token has no text")
                piece = Piece(error=f"token {token} has no text: {type(e).__name__}: {e}")
            if piece.finish or piece.error:
                self._seconds += 0.1 * (monotonic() - ticket.began - self._seconds)
                self._end(ticket, piece)
            else:
                ticket.give(piece)

    def _piece(self, ticket: Ticket, token: int) -> Piece:
        """What a token adds to an answer, and whether it ends it."""
        text = "" if ticket.text is None else ticket.text.add(token)
        stopped = token in self.defaults.ends or (ticket.text is not None and ticket.text.stopped)
        if not stopped and len(ticket.out) < ticket.ask.max_tokens:
            return Piece([token], text)
        if ticket.text is not None:
            text += ticket.text.end()
            stopped = stopped or ticket.text.stopped
        return Piece([token], text, "stop" if stopped else "length")

    def _failed(self, tickets: Sequence[Ticket], why: Exception) -> None:
        """A pass failed: its rows begin again, each alone, from the tokens that they have; not for ever."""
        _log.error("a pass over %d rows failed", len(tickets), exc_info=why)
        for ticket in tickets:
            ticket.tries += 1
            if ticket.tries > 2 or len(tickets) == 1:
                self._end(ticket, Piece(error=f"the model failed on this request: {type(why).__name__}: {why}"))
        with self._changed:
            self._waiting.extendleft([t for t in reversed(tickets) if not t.done])

    def _end(self, ticket: Ticket, piece: Piece | None) -> None:
        ticket.done = True
        self._release(ticket)
        if piece is not None:
            ticket.give(piece)

    def _release(self, ticket: Ticket) -> None:
        if ticket.key != BASE:
            self.adapters.release(ticket.key)
