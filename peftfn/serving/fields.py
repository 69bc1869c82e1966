"""The fields of a request: the values that each may have, and the error for any other."""

import json
from collections.abc import Callable
from typing import Any, NoReturn


class Refused(Exception):
    """A request that is not answered: its status, the field that is wrong, and in how many seconds to try again."""

    def __init__(
        self, status: int, what: str, field: str | None = None, code: str | None = None, retry: int | None = None
    ):
        super().__init__(what)
        self.status, self.field, self.code, self.retry = status, field, code, retry


def _wrong(name: str, value: Any, want: str) -> NoReturn:
    raise Refused(400, f"{name} is {brief(value)}; it must be {want}", name)


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        _wrong(name, value, "a text")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _wrong(name, value, "true or false")


def _whole(low: int, high: int, words: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            _wrong(name, value, words)

    return check


def _number(low: float, high: float, words: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            _wrong(name, value, words)

    return check


def _listed(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        _wrong(name, value, "a list with at least one message")


def _stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage"}:
        _wrong(name, value, 'an object with "include_usage" alone')
    _flag(f"{name}.include_usage", value.get("include_usage", False))


def _stop(name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(t, str) and 0 < len(t) <= 256 for t in texts)
    ):
        _wrong(name, value, "a text, or a list of at most 4, each of 1 to 256 characters")


Check = Callable[[str, Any], None]
COMMON: dict[str, Check] = {
    "model": _text,
    "max_tokens": _whole(1, 2**31, "a whole number of at least 1"),
    "temperature": _number(0, 2, "a number from 0 to 2"),
    "top_p": _number(1e-9, 1, "a number above 0, up to 1"),
    "seed": _whole(-(2**63), 2**63 - 1, "a whole number of 64 bits"),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "return_token_ids": _flag,
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), _text),  # not used
}
COMPLETION: dict[str, Check] = {"prompt": lambda name, value: None}  # `_prompt` says what is wrong
CHAT: dict[str, Check] = {
    "messages": _listed,
    "max_completion_tokens": _whole(1, 2**31, "a whole number of at least 1"),
}
NEUTRAL: dict[str, Any] = {
    **{"n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0, "suffix": "", "logit_bias": {}},
    **{"presence_penalty": 0, "frequency_penalty": 0, "tools": [], "tool_choice": "none", "store": False},
    **{"response_format": {"type": "text"}, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True},
    **{"modalities": ["text"], "functions": [], "function_call": "none"},
}
"""OpenAI's fields that the server has nothing for, with the value that asks for nothing."""
