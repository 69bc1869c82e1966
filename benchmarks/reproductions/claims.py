"""All of them, in the page's order."""

from benchmarks.reproductions import (
    dora_pattern,
    expressive_power,
    intruders,
    learning_rates,
    lora_plus,
    merging,
    without_regret,
)
from benchmarks.reproductions.claim import Claim

MODULES = (learning_rates, lora_plus, without_regret, merging, intruders, dora_pattern, expressive_power)
READS_RECORDS = ("learning_rates",)
"""Claims that the records of the comparison answer."""
CLAIMS: dict[str, Claim] = {m.__name__.rpartition(".")[2]: m.CLAIM for m in MODULES}
