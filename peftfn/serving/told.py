"""Answers in OpenAI's shapes."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from peftfn.serving.asked import Asked


class Told:
    """One answer: whole, or chunk by chunk."""

    def __init__(self, asked: Asked):
        self._asked, self.count = asked, 0
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._made = int(time.time())

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; the token that ended the answer is one of them."""
        n = len(self._asked.ask.prompt)
        return {"prompt_tokens": n, "completion_tokens": self.count, "total_tokens": n + self.count}

    def whole(self, text: str, ids: Sequence[int], finish: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return self._shape(kind, [self._choice(said, ids, finish)]) | {"usage": self.usage}

    def first(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, (), None)] if self._asked.chat else []

    def piece(self, text: str, ids: Sequence[int], finish: str | None) -> list[dict[str, Any]]:
        """The chunks of a piece; none where there is nothing to tell."""
        if not (text or finish or (ids and self._asked.ids)):
            return []
        said = {"delta": {"content": text} if text else {}} if self._asked.chat else {"text": text}
        return [self._chunk(said, ids, finish)]

    def last(self) -> list[dict[str, Any]]:
        """What comes after the last piece."""
        return [self._shape(self._kind, []) | {"usage": self.usage}] if self._asked.usage else []

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _chunk(self, said: dict[str, Any], ids: Sequence[int], finish: str | None) -> dict[str, Any]:
        chunk = self._shape(self._kind, [self._choice(said, ids, finish)])
        return chunk | {"usage": None} if self._asked.usage else chunk

    def _choice(self, said: dict[str, Any], ids: Sequence[int], finish: str | None) -> dict[str, Any]:
        more = {"token_ids": list(ids)} if self._asked.ids else {}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish, **more}

    def _shape(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._made,
            "model": self._asked.model,
            "choices": choices,
        }


def error(status: int, what: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    what, field = _valid(what), None if field is None else _valid(field)
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": what, "type": kind, "param": field, "code": code}}


def _valid(text: str) -> str:
    """Text that has an encoding: what a request says is repeated in errors, and may be no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()
