"""The text of an answer while its tokens come: whole characters alone, and nothing that may be part of a stop."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Tokens of the prompt that are decoded along: whether a first word begins with a space depends on what is before."""


class Text:
    """The text of one answer.

    Args:
        tokenizer: of transformers.
        prompt: token ids; the last few are context.
        stops: texts at which the answer ends; they are not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)  # ids[from:read] is the context of what is decoded next
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token; often empty."""
        self._ids.append(token)
        return self._certain(self._new(last=False))

    def end(self) -> str:
        """Return what is left when no more tokens come."""
        if self.stopped:
            return ""
        out = self._certain(self._new(last=True))
        out, self._held = out + self._held, ""
        return out

    def _new(self, last: bool) -> str:
        """The characters of tokens that were not returned yet; none while the last one is incomplete."""
        before = self._decoded(self._ids[self._from : self._read])
        now = self._decoded(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        size = next((n for n in range(len(text), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]
