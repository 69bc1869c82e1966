"""What a request's JSON asks for: every field is used or refused, and nothing is larger than the limits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from peftfn.serving.chat import Chat
from peftfn.serving.fields import CHAT, COMMON, COMPLETION, NEUTRAL, Refused, brief
from peftfn.serving.sampling import Defaults, Sampling
from peftfn.serving.ticket import Ask


@dataclass(frozen=True)
class Limits:
    """How large a request may be.

    Args:
        body: bytes of its JSON.
        tokens: max_tokens.
        context: tokens of prompt and answer together.
    """

    body: int = 1 << 20
    tokens: int = 1024
    context: int = 4096


@dataclass(frozen=True)
class Asked:
    """A request: what the engine is asked, and how the answer is to be told."""

    ask: Ask
    chat: bool
    model: str
    stream: bool
    usage: bool
    ids: bool  # whether token ids are told too


def parsed(body: bytes) -> dict[str, Any]:
    """The object of a body. Refused where it is no JSON, or no object."""
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise Refused(400, f"the body is a JSON {type(found).__name__}; give an object")
    return found


def asked(
    fields: Mapping[str, Any],
    chat: Chat | None,
    base: str,
    tokenizer: Any,
    vocabulary: int,
    limits: Limits,
    own: Defaults,
) -> Asked:
    """What the fields of a request mean. Refused where one is unknown, has a value that is not supported, or is too
    large.

    Args:
        chat: they are those of /v1/chat/completions; None: of /v1/completions.
        base: the base's name as `model`.
        tokenizer: None: prompts are token ids.
        vocabulary: token ids are below it.
        own: what holds where a request says nothing.
    """
    given = {k: v for k, v in fields.items() if v is not None}  # null is what is not there
    mine = COMMON | (CHAT if chat else COMPLETION)
    for name, value in given.items():
        if name in mine:
            mine[name](name, value)
        elif name not in NEUTRAL:
            raise Refused(400, f"unknown field {name[:80]!r}; supported are {', '.join(sorted(mine))}", name[:80])
        elif value != NEUTRAL[name] or isinstance(value, bool) != isinstance(NEUTRAL[name], bool):
            only = json.dumps(NEUTRAL[name])
            raise Refused(400, f"{name} is {brief(value)}; this server supports {only} alone", name)
    for name in ("model", "messages" if chat else "prompt"):
        if name not in given:
            raise Refused(400, f"the field {name} is missing", name)
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise Refused(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
    if "stream_options" in given and not given.get("stream"):
        raise Refused(400, "stream_options is for a stream: give stream=true too", "stream_options")
    stops = [given["stop"]] if isinstance(given.get("stop"), str) else given.get("stop", [])
    if stops and tokenizer is None:
        raise Refused(400, "stop is text, and the model has no tokenizer", "stop")
    if chat:
        prompt = _tokens(chat.text(given["messages"]), tokenizer, "messages", add_special_tokens=False)
    else:
        prompt = _prompt(given["prompt"], tokenizer)
    max_tokens = _sized(prompt, given, bool(chat), vocabulary, limits)
    how = Sampling(given.get("temperature", own.temperature), given.get("top_p", own.top_p), given.get("seed"))
    adapter = None if given["model"] == base else given["model"]
    return Asked(
        Ask(prompt, adapter, max_tokens, how, stops),
        bool(chat),
        given["model"],
        given.get("stream", False),
        given.get("stream_options", {}).get("include_usage", False),
        given.get("return_token_ids", False) or tokenizer is None,
    )


def _sized(prompt: Sequence[int], given: Mapping[str, Any], chat: bool, vocabulary: int, limits: Limits) -> int:
    """The tokens of the answer, where prompt and answer are within the limits."""
    field = "messages" if chat else "prompt"
    if not prompt:
        raise Refused(400, f"{field} has no tokens", field)
    if (odd := next((t for t in prompt if not 0 <= t < vocabulary), None)) is not None:
        raise Refused(400, f"token {odd} is not in the model's vocabulary, 0 to {vocabulary - 1}", field)
    left = limits.context - len(prompt)
    if left < 1:
        raise Refused(
            400,
            f"the prompt has {len(prompt)} tokens; it may have {limits.context - 1}, with room for one to answer",
            field,
            "context_length_exceeded",
        )
    usual = min(limits.tokens, left) if chat else min(16, limits.tokens, left)
    wanted: int = given.get("max_completion_tokens", given.get("max_tokens", usual))
    if wanted > limits.tokens:
        raise Refused(400, f"max_tokens is {wanted}; this server makes at most {limits.tokens}", "max_tokens")
    if wanted > left:
        raise Refused(
            400,
            f"the prompt has {len(prompt)} tokens, and max_tokens is {wanted}; together they may be {limits.context}",
            "max_tokens",
            "context_length_exceeded",
        )
    return wanted


def _prompt(value: Any, tokenizer: Any) -> list[int]:
    """Token ids of a text, of ids, or of a list with one of these."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise Refused(400, f"prompt is a list of {len(value)} prompts; give one a request", "prompt")
        value = value[0]
    if isinstance(value, str):
        return _tokens(value, tokenizer, "prompt", add_special_tokens=True)
    if isinstance(value, list) and all(type(t) is int for t in value):
        return value
    raise Refused(400, "prompt must be a text, or a list of token ids", "prompt")


def _tokens(text: str, tokenizer: Any, field: str, **how: bool) -> list[int]:
    if tokenizer is None:
        raise Refused(400, f"{field} is text, and the model has no tokenizer: give a list of token ids", field)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Refused(400, f"{field} is not valid Unicode: {e.reason} at character {e.start}", field) from e
    ids: list[int] = tokenizer.encode(text, **how)
    return ids


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
