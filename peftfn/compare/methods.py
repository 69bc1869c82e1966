"""The methods that are compared, with the places that each is for. Sizes are near those of a LoRA of rank 4."""

from dataclasses import dataclass

import peftfn as pf

PLACES = {
    "matrices": r".*(query|key|value|dense)\.weight",
    "modules": r".*output\.dense$",
    "inputs": r".*(query|key|value)\.dense\.weight",
    "norms": r".*LayerNorm",
    "biases": r".*bias$",
}
"""Regular expressions behind a task's layers."""


@dataclass(frozen=True)
class Recipe:
    """A method and where it stands: a name of `PLACES`, or a regular expression behind a task's layers."""

    method: pf.Method
    places: str = "matrices"
    small: bool = False  # runs on small tasks alone, unless it and another task are named

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
    "AdaLoRA": Recipe(pf.AdaLoRA(rank=4), small=True),
    "AdaMSS": Recipe(pf.AdaMSS(space=32, clusters=4, rank=2), small=True),
    "AdapterPlus": Recipe(pf.AdapterPlus(rank=8), "modules", small=True),
    "BDLoRA": Recipe(pf.BDLoRA(rank=4, blocks=2), small=True),
    "BEFT": Recipe(pf.BEFT(), r".*value\.dense\.weight", small=True),
    "BOFT": Recipe(pf.BOFT(block_size=8, factors=2), small=True),
    "C3A": Recipe(pf.C3A(block_size=16), small=True),
    "Compacter": Recipe(pf.Compacter(rank=8), "modules", small=True),
    "DEFT": Recipe(pf.DEFT(rank=4), small=True),
    "DeLoRA": Recipe(pf.DeLoRA(rank=4), small=True),
    "DiagOFT": Recipe(pf.DiagOFT(block_size=8), small=True),
    "FRoD": Recipe(pf.FRoD(), "inputs", small=True),
    "GLoRA": Recipe(pf.GLoRA(rank=4), small=True),
    "GraLoRA": Recipe(pf.GraLoRA(rank=4), small=True),
    "HiRA": Recipe(pf.HiRA(rank=4), small=True),
    "KaSA": Recipe(pf.KaSA(rank=4), small=True),
    "Lily": Recipe(pf.Lily(rank=4), "inputs", small=True),
    "MiCA": Recipe(pf.MiCA(rank=4), small=True),
    "MoELoRA": Recipe(pf.MoELoRA(rank=2, experts=2), small=True),
    "PEANuT": Recipe(pf.PEANuT(rank=8), small=True),
    "PSOFT": Recipe(pf.PSOFT(rank=16), small=True),
    "QALoRA": Recipe(pf.QALoRA(rank=4), small=True),
    "RandLoRA": Recipe(pf.RandLoRA(rank=8), small=True),
    "RoAd": Recipe(pf.RoAd(group_size=16), small=True),
    "SHiRA": Recipe(pf.SHiRA(rank=4), small=True),
    "SuperTuning": Recipe(pf.SuperTuning(sparsity=0.9), small=True),
    "TLoRA": Recipe(pf.TLoRA(rank=4), small=True),
    "TinyLoRA": Recipe(pf.TinyLoRA(), small=True),
    "UniLoRA": Recipe(pf.UniLoRA(rank=4, length=2048), small=True),
    "VBLoRA": Recipe(pf.VBLoRA(rank=4, vectors=64, length=16), small=True),
    "WaveFT": Recipe(pf.WaveFT(n_frequency=1000), small=True),
}
"""Not here: prompts and prefixes, which want a model that takes embeddings, and methods that are one of these with
another start, penalty or noise."""
