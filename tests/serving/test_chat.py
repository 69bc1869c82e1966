"""Chat templates of the kinds that models have: what they render is what transformers renders, and what they refuse is
said in their own words."""

from typing import Any

import pytest
from served import tokenizer

from peftfn.serving.chat import Chat
from peftfn.serving.fields import Refused

START = "{{ bos_token }}"
ORDER = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}[be kind]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "no system": START
    + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ORDER
    + "{% for m in messages %}<{{ 'model' if m['role'] == 'assistant' else m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}",
    "system in the first turn": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}" + ORDER + START
    + "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.first and s %}<<{{ s }}>>{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "tools and a date": "{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%Y')[:0] }}"
    "{% for m in messages %}{% if m.tool_calls %}!{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "training": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "parts or text": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
}  # fmt: skip
SYSTEM, USER, OTHER = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the hat"},
    {"role": "user", "content": "a hat"},
)
SAID = {"role": "assistant", "content": "at the hat"}
TALKS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "two turns": [USER, SAID, OTHER],
    "all": [SYSTEM, USER, SAID, OTHER],
    "no order": [USER, OTHER],
}
REFUSED = {
    ("no system", "system"): "System role not supported",
    ("no system", "all"): "System role not supported",
    ("no system", "no order"): "roles must alternate user/assistant",
    ("system in the first turn", "no order"): "roles must alternate user/assistant",
}


def words(template: str | None) -> Any:
    made = tokenizer()
    made.chat_template, made.bos_token = template, "<pad>"
    return made


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_dialogue_is_what_transformers_makes_of_it_or_refused_in_the_templates_words(
    template: str, talk: str
) -> None:
    made, messages = words(TEMPLATES[template]), TALKS[talk]
    if (why := REFUSED.get((template, talk))) is not None:
        with pytest.raises(Refused, match=f"chat template refuses these messages: .*{why}") as refused:
            Chat(made).text(messages)
        assert (refused.value.status, refused.value.field) == (400, "messages")
        return
    given = messages
    if template == "parts":
        given = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = Chat(made).text(messages)
    ids = made.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert made.encode(text, add_special_tokens=False) == ids
    assert all(m["content"] in text for m in messages), "the template left out what was said"
    split = [
        m | {"content": [{"type": "text", "text": t} for t in (m["content"][:2], m["content"][2:])]} for m in messages
    ]
    assert Chat(made).text(split) == text
    nulls = [{"refusal": None, "tool_calls": None, "name": None} | m for m in messages]
    assert Chat(made).text(nulls) == text


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "tool", "content": "3", "tool_call_id": "x"}, r"messages\[1\] has 'tool_call_id'; this server takes"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, r"messages\[1\] has 'tool_calls'"),
        ({"role": "assistant", "content": None, "refusal": "no"}, r"messages\[1\] has 'refusal'"),
        ({"role": "user", "content": "a", "name": "ann"}, r"messages\[1\] has 'name'"),
        ({"role": "assistant", "content": None}, r"messages\[1\] must have a role, which is a text, and content"),
        ({"role": 3, "content": "a"}, r"messages\[1\] must have a role, which is a text"),
        ("a", r"messages\[1\] must be an object"),
    ],
)
def test_a_message_with_more_than_a_text_is_refused_by_the_name_of_the_field(message: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        Chat(words(TEMPLATES["tools and a date"])).text([USER, message])


def test_templates_that_cannot_render_are_errors_of_the_request() -> None:
    with pytest.raises(Refused, match="no chat template; use /v1/completions"):
        Chat(words(None)).text([USER])
    for template, why in (("{% for", "refuses these messages"), ("{{ a.b.c }}", "'a' is undefined")):
        with pytest.raises(Refused, match=why):
            Chat(words(template)).text([USER])
