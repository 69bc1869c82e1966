"""Real architectures: every check of the zoo on the kinds of families.py, held against known.json. make zoo: all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import peftfn as pf
from zoo import known
from zoo.build import Subject, kinds, rows_first, subject
from zoo.checks import CHECKS, NotApplicable, gap
from zoo.families import CHOSEN
from zoo.outcome import FAILS, HOLDS, NOT_APPLICABLE, REFUSED, Outcome, outcome, outcomes
from zoo.purity import difference, state

LISTED = known.read()


@pytest.mark.filterwarnings("ignore")  # transformers' own, in forwards that few people run
@pytest.mark.parametrize("kind", CHOSEN)
def test_every_check_on(kind: str) -> None:
    wrong = known.complaints(kind, outcomes(subject(kind)), LISTED)
    assert not wrong, "\n".join(wrong)


def test_the_chosen_kinds_are_many_and_exist() -> None:
    assert len(set(CHOSEN)) == len(CHOSEN) >= 60
    assert set(CHOSEN) <= set(kinds())


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_applies_to_many_of_the_chosen_kinds(check: str) -> None:
    """So that none is empty: what a kind's line lists as not applicable is asserted above."""
    assert sum(check not in LISTED[kind][NOT_APPLICABLE] for kind in CHOSEN) >= 15


def test_known_failures_are_of_checks_and_kinds_that_exist() -> None:
    assert set(LISTED) <= set(kinds())
    for kind, line in LISTED.items():
        assert {*line[FAILS], *line[NOT_APPLICABLE]} <= set(CHECKS), kind
        assert all(line[FAILS].values()), f"{kind}: a reason is missing"


# the zoo's own judgement


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3)
        self.cache: dict[str, list[int]] = {"lengths": [1]}
        self.scale = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def two() -> Subject:
    return Subject("two", Two().eval(), {"x": torch.randn(5, 4)}, rows_first, False)


WRITES: dict[str, Callable[[Two], object]] = {
    "a forward hook": lambda m: m.head.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.body.register_full_backward_hook(lambda *_: None),
    "a parameter's bits, past the version": lambda m: m.head.weight.data.add_(1),
    "a parameter's version": lambda m: m.head.weight.detach().add_(0),
    "a parameter's gradient": lambda m: m(torch.randn(5, 4)).sum().backward(),
    "whether a parameter is trained": lambda m: m.head.weight.requires_grad_(False),
    "another parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
    "a buffer": lambda m: m.train().body[1].running_mean.data.fill_(3),
    "a mode": lambda m: m.body[1].train(),
    "an attribute": lambda m: setattr(m.head, "ready", True),
    "a tensor that is no buffer": lambda m: m.scale.data.mul_(2),
    "a list in a dict": lambda m: m.cache["lengths"].append(2),
    "a forward": lambda m: setattr(m.head, "forward", m.head.forward),
    "a module": lambda m: m.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_purity_sees(write: Callable[[Two], object]) -> None:
    model = Two().eval()
    before = state(model)
    assert not difference(before, state(model))
    write(model)
    assert difference(before, state(model))


def test_purity_ignores_what_only_reads() -> None:
    model = Two().eval()
    before = state(model)
    model(torch.randn(5, 4))
    assert not difference(before, state(model))


def raises(error: Exception) -> Callable[[Subject], None]:
    def check(s: Subject) -> None:
        raise error

    return check


def names_no_place(s: Subject) -> None:
    net = pf.adapt(s.model, {"head": pf.LoRA(rank=2)})
    net.mixed(pf.stack([net.init()]), [7], **s.inputs)


def names_a_place(s: Subject) -> None:
    net = pf.adapt(s.model, {"head": pf.LoRA(rank=2)})
    net.apply({}, **s.inputs)


def fails_in_torch(s: Subject) -> None:
    net = pf.adapt(s.model, {"head": pf.LoRA(rank=2)})
    net.apply(net.init(), torch.randn(5, 3))


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (raises(AssertionError("body.0 differs")), FAILS),
        (raises(ValueError("body.0.weight is not ours to raise")), FAILS),
        (raises(NotApplicable("no rows")), NOT_APPLICABLE),
        (names_no_place, FAILS),
        (names_a_place, REFUSED),
        (fails_in_torch, FAILS),
        (lambda s: None, HOLDS),
    ],
    ids=["an assertion", "an error of others", "not applicable", "ours, no place", "ours, a place", "torch's", "none"],
)
def test_a_refusal_is_ours_and_names_a_place(check: Callable[[Subject], None], status: str) -> None:
    assert outcome(check, two()).status == status


def test_a_small_model_holds() -> None:
    seen = {name: o.status for name, o in outcomes(two()).items()}
    assert {name for name, status in seen.items() if status != HOLDS} == {
        *("hidden_states", "generation", "mixed_generation", "rematerialised")
    }, seen


def test_values_shapes_numbers_and_what_is_not_finite_are_compared() -> None:
    t = torch.tensor([1.0, 2.0, torch.inf])
    assert not gap([t], [t.clone()])
    assert gap([t], [t, t])
    assert gap([t], [t[:2]])
    assert gap([t], [t.nan_to_num(posinf=0.0)])
    assert gap([t], [t + torch.tensor([0.01, 0.0, 0.0])])


def test_known_failures_are_held_against_both_ways() -> None:
    listed = {"two": {FAILS: {"merging": "differs", "gone": "?"}, NOT_APPLICABLE: ["generation"]}}
    good = {"merging": Outcome(FAILS, "differs"), "generation": Outcome(NOT_APPLICABLE), "purity": Outcome(REFUSED)}
    assert known.complaints("two", good, listed) == ["two, gone: there is no such check: remove it from the list"]
    bad = {
        "merging": Outcome(HOLDS),
        "generation": Outcome(HOLDS),
        "purity": Outcome(FAILS, "a hook"),
        "gone": Outcome(FAILS),
    }
    words = known.complaints("two", bad, listed)
    assert [w.split(" ")[1].strip(",") for w in words] == ["merging", "generation", "purity"]
    assert ["remove it from the list" in w for w in words] == [True, True, False]
    assert known.complaints("two", bad | {"purity": Outcome(NOT_APPLICABLE)}, listed)[-1].startswith(
        "two, purity does not"
    )


def test_a_written_list_is_read_back_and_keeps_its_reasons(tmp_path: Path) -> None:
    listed = {"two": {FAILS: {"merging": "why, in words"}, NOT_APPLICABLE: []}}
    seen = {"merging": Outcome(FAILS, "differs"), "purity": Outcome(FAILS, "a hook"), "identity": Outcome(HOLDS)}
    known.write(known.updated(listed, "two", seen), tmp_path / "known.json")
    line = known.read(tmp_path / "known.json")["two"]
    assert line == {FAILS: {"merging": "why, in words", "purity": "a hook"}, NOT_APPLICABLE: []}
