"""Types of hyper-parameters that check themselves, for the fields of a method of your own."""

from peftfn.core.fields import (
    STARTS,
    Positive,
    Probability,
    Start,
    Whole,
    at_most,
    choice,
    divides,
    plain,
    positive,
    probability,
    whole,
)

__all__ = [
    "STARTS",
    "Positive",
    "Probability",
    "Start",
    "Whole",
    "at_most",
    "choice",
    "divides",
    "plain",
    "positive",
    "probability",
    "whole",
]
