"""Real architectures: every check of the zoo on the kinds below, against what tests/zoo/known.json says. make zoo runs all."""

import copy
import json

import pytest
import torch
from torch import nn
from zoo import known
from zoo.build import Subject, kinds, rows_first, subject
from zoo.families import CHOSEN
from zoo.checks import CHECKS, NotApplicable, purity
from zoo.outcome import FAILS, HOLDS, NOT_APPLICABLE, REFUSED, Outcome, outcome, outcomes
from zoo.purity import difference, state

LISTED = known.read()


@pytest.mark.filterwarnings("ignore")  # transformers' own, in forwards that few people run
@pytest.mark.parametrize("kind", CHOSEN)
def test_every_check_on(kind: str) -> None:
    wrong = known.complaints(kind, outcomes(subject(kind)), LISTED)
    assert not wrong, "\n".join(wrong)
