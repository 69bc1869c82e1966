"""Dialogues: messages to token ids, by the tokenizer's own template."""

from collections.abc import Sequence
from typing import Any

from peftfn.serving.fields import Refused

_PROBE = "a question"


class Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers; None: there is none, and every dialogue is refused.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._parts = self._wants_parts()

    def text(self, messages: Sequence[Any]) -> str:
        """The text of a dialogue, up to where the answer begins.

        Raises:
            Refused: there is no template, a message is none, or the template takes no such dialogue.
        """
        if not self._has_template():
            raise Refused(400, "the model has no chat template; use /v1/completions", "messages")
        said = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
        try:
            return self._rendered(said, self._parts)
        except Exception as e:  # a template raises what it likes: an order of roles that it does not take, for one
            raise Refused(400, f"the model's chat template refuses these messages: {e}", "messages") from e

    def _has_template(self) -> bool:
        return self._tokenizer is not None and bool(getattr(self._tokenizer, "chat_template", None))

    def _rendered(self, said: Sequence[tuple[str, str]], parts: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in said
        ]
        out: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return out

    def _wants_parts(self) -> bool:
        """Whether the template reads content as a list of parts alone. Of a text it would leave out every word, and say
        nothing."""
        if not self._has_template():
            return False
        shown = []
        for parts in (False, True):
            try:
                shown.append(_PROBE in self._rendered([("user", _PROBE)], parts))
            except Exception:  # it may want other roles too, or take one of the two forms alone
                shown.append(False)
        return shown == [False, True]


def _message(m: Any, where: str) -> tuple[str, str]:
    """(role, text) of a message."""
    if not isinstance(m, dict):
        raise Refused(400, f"{where} must be an object with role and content", "messages")
    given = {k: v for k, v in m.items() if v is not None}  # null is what is not there
    if odd := given.keys() - {"role", "content"}:
        raise Refused(
            400, f"{where} has {min(odd)[:80]!r}; this server takes role and content, and no more", "messages"
        )
    if not isinstance(given.get("role"), str) or "content" not in given:
        raise Refused(400, f"{where} must have a role, which is a text, and content", "messages")
    content = given["content"]
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                raise Refused(400, f"{where} has content that is no text; this server takes text alone", "messages")
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise Refused(400, f"{where}: content must be a text, or a list of parts of type text", "messages")
    return given["role"], content
