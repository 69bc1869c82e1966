"""The methods that are compared, with the places that each is for. Sizes are near those of a LoRA of rank 4."""

from dataclasses import dataclass

import peftfn as pf

PLACES = {
    "matrices": r".*(query|key|value|dense)\.weight",
    "modules": r".*output\.dense$",
    "norms": r".*LayerNorm",
    "biases": r".*bias$",
}
"""Regular expressions behind a task's layers."""


@dataclass(frozen=True)
class Recipe:
    """A method and where it stands: a name of `PLACES`, or a regular expression behind a task's layers."""

    method: pf.Method
    places: str = "matrices"

    def rules(self, layers: str) -> dict[str, pf.Method]:
        """Rules for `adapt`; `layers` as a `Ready` has it."""
        return {layers + PLACES.get(self.places, self.places): self.method}


METHODS = {
    "LoRA": Recipe(pf.LoRA(rank=4)),
    "DoRA": Recipe(pf.DoRA(rank=4)),
    "PiSSA": Recipe(pf.PiSSA(rank=4)),
    "OLoRA": Recipe(pf.OLoRA(rank=4)),
    "IA3": Recipe(pf.IA3()),
    "VeRA": Recipe(pf.VeRA(rank=64)),
    "OFT": Recipe(pf.OFT(block_size=8)),
    "HRA": Recipe(pf.HRA(rank=4)),
    "LoHa": Recipe(pf.LoHa(rank=2)),
    "LoKr": Recipe(pf.LoKr(rank=4)),
    "MiSS": Recipe(pf.MiSS(rank=8)),
    "FourierFT": Recipe(pf.FourierFT(n_frequency=1000)),
    "Bottleneck": Recipe(pf.Bottleneck(rank=8), "modules"),
    "BitFit": Recipe(pf.Full(), "biases"),
    "LNTuning": Recipe(pf.Full(), "norms"),
    "Full": Recipe(pf.Full()),
}
