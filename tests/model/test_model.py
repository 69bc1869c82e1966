"""A model read as a value, and how often it is read: a walk over a large model takes milliseconds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.model.model import Model, modules_of, quantised_in, weights_of
from peftfn.tensors.quantised import QuantisedWeight

RULES = {r"layers\.\d": pf.LoRA(rank=2)}


class Counted(nn.Module):
    """A model that counts the walks over it; a walk asks the root for its modules once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.walks = [0]  # a list: a copy of the model has one of its own

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        self.walks[0] += 1
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def walks(model: Counted, job: Callable[[], Any]) -> int:
    before = model.walks[0]
    job()
    return model.walks[0] - before


def test_adapt_reads_the_model_twice() -> None:
    """Once for the plan, once for the copy that calls run on."""
    model = Counted()
    assert walks(model, lambda: pf.adapt(model, RULES)) == 2


@pytest.mark.parametrize("format", ["native", "peft", "swift", "kohya"])
def test_load_reads_the_model_twice(format: str, tmp_path: Path) -> None:
    model = Counted()
    net = pf.adapt(model, RULES)
    a = net.init()
    assert walks(model, lambda: pf.save(tmp_path / "a", net, a, format=format)) <= 1
    assert walks(model, lambda: pf.load(tmp_path / "a", model)) == 2


@pytest.mark.parametrize(
    "job",
    [
        pf.describe,
        pf.sites,
        lambda m: pf.targets(m, pf.LoRA(2), ["0", "1"], exclude=["1"]),
        lambda m: pf.targets(m, pf.LoRA(2), "all-linear"),
    ],
    ids=["describe", "sites", "targets", "targets, all-linear"],
)
def test_what_is_asked_of_a_model_reads_it_once(job: Callable[[nn.Module], Any]) -> None:
    model = Counted()
    assert walks(model, lambda: job(model)) == 1


def test_what_is_asked_of_a_net_reads_its_model_once() -> None:
    model = Counted()
    net = pf.adapt(model, RULES)
    a = net.init()
    for job in (net.init, lambda: net.merge(a), lambda: net.delta(a), lambda: net.prepare(a), lambda: pf.summary(net)):
        assert walks(model, job) == 1


def test_every_name_of_what_a_model_has() -> None:
    shared, packed = nn.BatchNorm1d(4), Packed(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(4, 4)]), "c": packed, "d": packed})
    known = Model.of(model)
    assert known.root is model
    assert list(known.modules) == ["", "a", "b", "b.0", "b.1", "c", "d"]
    assert list(known.distinct) == [n for n, _ in model.named_modules()]
    assert list(known.parameters.items()) == list(model.named_parameters(remove_duplicate=False))
    assert list(known.buffers.items()) == list(model.named_buffers(remove_duplicate=False))
    assert known.sites["a.weight"].aliases == ("b.0.weight",)
    assert known.named["b.0.weight"] is known.sites["a.weight"]
    assert {n for n, w in known.weights.items() if isinstance(w, QuantisedWeight)} == {"c.weight", "d.weight"}
    assert known.weights["c.weight"] is known.weights["d.weight"]
    assert not any(w.requires_grad for w in known.weights.values())
    assert weights_of(model).keys() == known.weights.keys()
    assert quantised_in(modules_of(model)).keys() == {"c.weight", "d.weight"}


class Packed(nn.Module):
    """A layer whose weight cannot be read as a matrix."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.ones(out_features, in_features, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        w: Any = self.qweight
        return x @ w.to(x.dtype).mT


def test_what_is_no_module_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not dict"):
        pf.adapt({}, RULES)  # type: ignore[arg-type]
