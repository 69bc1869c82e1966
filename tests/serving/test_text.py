"""The text of an answer: the pieces together are what the tokens decode to, up to the first stop."""

from typing import Any

import pytest
from served import tokenizer

from peftfn.serving.text import Text


def pieces(text: Text, ids: list[int]) -> list[str]:
    out = []
    for token in ids:
        out.append(text.add(token))
        if text.stopped:
            break
    return [*out, text.end()]


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


@pytest.mark.parametrize("said", ["the hat", " a héron ☂ 漢字 👩‍🚀!", "", "  two  spaces\n", "�"])
@pytest.mark.parametrize("prompt", ["", "hé", "he said"])
def test_pieces_are_whole_characters_and_the_decoded_text(said: str, prompt: str, words: Any) -> None:
    got = pieces(Text(words, words.encode(prompt)), words.encode(said))
    assert "".join(got) == said
    assert said == "�" or not any("�" in p for p in got)


def test_an_answer_cut_inside_a_character_shows_that(words: Any) -> None:
    got = pieces(Text(words, []), words.encode("a☂")[:-1])
    assert "".join(got) == "a�"


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (["hat"], "the "),
        (["xyz", "e h"], "th"),
        (["the"], ""),
        (["hats"], "the hat"),
        (["t", "th"], ""),
        (["at", "ha"], "the "),
    ],
)
def test_a_stop_ends_the_text_wherever_tokens_end(stops: list[str], want: str, words: Any) -> None:
    text = Text(words, [], stops)
    got = pieces(text, words.encode("the hat"))
    assert "".join(got) == want
    assert text.stopped == (want != "the hat")
