"""Types of hyper-parameters that check themselves, for the fields of a method of your own."""

from peftfn.core.fields import (
    STARTS,
    Positive,
    PositiveInt,
    Probability,
    Rounds,
    Start,
    at_most,
    choice,
    divides,
    plain,
    positive,
    positive_int,
    probability,
    rounds,
)

__all__ = [
    "STARTS",
    "Positive",
    "PositiveInt",
    "Probability",
    "Rounds",
    "Start",
    "at_most",
    "choice",
    "divides",
    "plain",
    "positive",
    "positive_int",
    "probability",
    "rounds",
]
