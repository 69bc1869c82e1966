"""Many kinds, each in a process of its own, which a time limit ends: some architectures are slow, some crash."""

import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from .build import subject
from .outcome import FAILS, NOT_APPLICABLE, REFUSED, Outcome, outcomes

FORK = multiprocessing.get_context("fork")  # torch and transformers are imported once


@dataclass(frozen=True)
class Record:
    """What was seen of one kind. seconds: of the CPU. unbuilt: why there is nothing to check."""

    kind: str
    model: str = ""
    checks: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0
    unbuilt: str = ""

    @property
    def holds(self) -> bool:
        return not self.unbuilt and all(o.status != FAILS for o in self.checks.values())

    def __str__(self) -> str:
        """One line."""
        if self.unbuilt:
            return f"{self.kind}: not built: {self.unbuilt}"
        seen: dict[str, list[str]] = {}
        for check, o in self.checks.items():
            seen.setdefault(o.status, []).append(check)
        words = [f"{s}: {', '.join(seen[s])}" for s in (FAILS, REFUSED, NOT_APPLICABLE) if s in seen]
        return "; ".join([f"{self.kind} ({self.model}) {'holds' if self.holds else 'does not hold'}", *words])


def record(kind: str) -> Record:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about odd configurations
        try:
            s = subject(kind)
        except Exception as e:
            return Record(kind, unbuilt=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
        checks = outcomes(s)
    return Record(kind, type(s.model).__name__, checks, round(time.process_time() - start, 1))


def sweep(kinds: Sequence[str], workers: int, limit: int) -> Iterator[Record]:
    """The records, in the order in which they are ready. limit: CPU seconds a kind."""
    todo, live = list(kinds), {}
    while todo or live:
        while todo and len(live) < workers:
            kind = todo.pop(0)
            reader, writer = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(kind, writer, limit))
            process.start()
            writer.close()
            live[reader] = kind, process
        for reader in wait(list(live)):
            kind, process = live.pop(reader)
            try:
                yield reader.recv()
            except EOFError:
                process.join()
                late = process.exitcode == -signal.SIGPROF
                yield Record(kind, unbuilt=f"stopped after {limit} s" if late else f"died with {process.exitcode}")
            process.join()


def _child(kind: str, writer: Connection, limit: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, limit)  # of the CPU: a busy machine does not end it
    writer.send(record(kind))
