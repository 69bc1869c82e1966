"""What is checked of two adapters on one model, as PEFT's tests use them: both active, and each for rows of its own."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.func import functional_call

import peftfn as pf

from .cases import Case
from .checks import PeftFails, by_row, holds, output, perturb_, read, same, theirs

NAMES = ["one", "two"]


class Composed(Exception):
    """PEFT's active adapters do not add up, and ours do, as the docs say."""


class Pair:
    """Two adapters, trained and written by PEFT one at a time, in one of its models and in two nets of ours."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder = case, folder
        self.lone: dict[str, Tensor] = {}

    @cached_property
    def peft(self) -> Any:
        configs = [self.case.config(), self.case.second()]
        with theirs():
            for seed, (name, config) in enumerate(zip(NAMES, configs, strict=True), 1):
                self._write(name, config, seed)
            cls = PeftModel if type(configs[0]) is type(configs[1]) else PeftMixedModel
            model = cls.from_pretrained(self.case.model(), str(self.folder / NAMES[0]), adapter_name=NAMES[0])
            model.load_adapter(str(self.folder / NAMES[1]), adapter_name=NAMES[1])
            return model.eval()

    def _write(self, name: str, config: PeftConfig, seed: int) -> None:
        torch.manual_seed(seed)
        model = get_peft_model(self.case.model(), config)
        perturb_(model, seed)
        model.eval().save_pretrained(str(self.folder / name))
        with torch.no_grad():
            self.lone[name] = output(model(**self.case.inputs))

    def want(self, names: list[str]) -> Tensor:
        """PEFT's output with these active. It must still give each as it was alone: the base of a PiSSA is not the base
        of the other."""
        for name in NAMES:
            one = self.active([name])
            if not torch.equal(one, self.active([name])):
                raise PeftFails("its output is drawn anew in each call")
            if not holds(one, lambda name=name: self.lone[name]):
                raise PeftFails("with both loaded, one is no longer what it was")
        return self.active(names)

    def active(self, names: list[str]) -> Tensor:
        peft = self.peft
        with theirs(), torch.no_grad():
            if len(names) == 1:
                peft.set_adapter(names[0])
            else:
                for module in peft.modules():
                    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                        module.set_adapter(names)
            return output(peft(**self.case.inputs))

    @cached_property
    def loaded(self) -> list[tuple[pf.Adapted, pf.Adapter]]:
        self.peft  # noqa: B018  (that PEFT makes them comes first)
        model = self.case.model()
        return [read(self.folder / name, model) for name in NAMES]

    def merged(self, name: str) -> dict[str, Tensor]:
        """The parameters of a base into which PEFT merges one of them."""
        self.peft  # noqa: B018
        with theirs(), torch.no_grad():
            model = PeftModel.from_pretrained(self.case.model(), str(self.folder / name)).merge_and_unload()
            return {n: p.detach() for n, p in model.named_parameters()}


def alone(pair: Pair) -> None:
    """Each of them is what PEFT computes with it active."""
    for i, name in enumerate(NAMES):
        want = pair.want([name])
        net, a = pair.loaded[i]
        with torch.no_grad():
            same(output(net.apply(a, **pair.case.inputs)), want)


def both(pair: Pair) -> None:
    """Both together, in a call and in a module, are what PEFT computes with both active.

    Where PEFT's second adapter acts on what the first gave, they are the sum of both changes.
    """
    want = pair.want(NAMES)
    (net, a), (other, b) = pair.loaded
    with torch.no_grad():
        m = pf.as_module(net, one=a, two=(other, b)).eval()
        m.use_(NAMES)
        got = output(m(**pair.case.inputs))
        nets = pf.Nets([net, other])
        same(output(nets.gated([pf.stack([a]), pf.stack([b])], [1.0, 1.0], **pair.case.inputs)), got)
    if holds(got, lambda: want):
        return
    base, first, second = dict(pair.case.model().named_parameters()), *map(pair.merged, NAMES)
    with torch.no_grad():
        total = {n: first[n] + second[n] - w for n, w in base.items()}
        sums = output(functional_call(pair.case.model(), total, (), pair.case.inputs))
    if holds(got, lambda: sums):
        raise Composed("PEFT's second adapter acts on what the first gave; this is the sum of both changes")
    same(got, want)


def rows(pair: Pair) -> None:
    """In one batch, each row has the base, the first or the second."""
    inputs = pair.case.inputs
    with theirs(), torch.no_grad():
        base = output(pair.case.model()(**inputs))
    whole = [base, pair.want(NAMES[:1]), pair.want(NAMES[1:])]
    (net, a), (other, b) = pair.loaded
    index = [i % 3 - 1 for i in range(len(next(iter(inputs.values()))))]
    with torch.no_grad():
        got = output(pf.Nets([net, other]).mixed([pf.stack([a]), pf.stack([b])], index, **inputs))
    got, *whole = (by_row(t, len(index)) for t in (got, *whole))
    if holds(got, lambda: torch.stack([whole[i + 1][n] for n, i in enumerate(index)])):
        return
    for i, name in enumerate(NAMES):  # Lily lets the rows that it is given see each other
        own = [n for n, which in enumerate(index) if which == i]
        pair.active([name])
        with theirs(), torch.no_grad():
            alike = output(pair.peft(**{k: t[own] for k, t in inputs.items()}))
        whole[i + 1][own] = by_row(alike, len(own))
    same(got, torch.stack([whole[i + 1][n] for n, i in enumerate(index)]))


CHECKS: tuple[Callable[[Pair], None], ...] = (alone, both, rows)
