"""Quantised layers: which they are, and what stands for the weight of each (`quantised_weight.py`)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from peftfn.tensors.quantised_layers import KINDS, features, held
from peftfn.tensors.quantised_weight import QuantisedWeight

__all__ = ["Bare", "Parts", "QuantisedWeight", "held", "quantised", "share"]


def quantised(module: nn.Module, name: str = "weight") -> QuantisedWeight | None:
    """What stands for the weight of `module`, named `name` in errors; None for a layer whose weight is a matrix."""
    w: Any = module._parameters.get("weight")
    if isinstance(w, UninitializedParameter) or (
        type(w) is nn.Parameter and w.is_floating_point() and w.dtype.itemsize > 1
    ):
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):  # rows to look up, and no product
        return None
    for kind in KINDS:
        if kind.recognises(module):
            return kind(module, name, features(module) or w.shape)
    return None


class Parts(Mapping[str, Any]):
    """A quantised layer's weight and bias, as a dict that is read anew each time."""

    def __init__(self, weight: QuantisedWeight):
        self.weight = weight

    def __getitem__(self, key: str) -> Any:
        return self.weight if key == "weight" else self.weight.bias()

    def __iter__(self) -> Iterator[str]:
        return iter(("weight", "bias"))

    def __len__(self) -> int:
        return 2


def share(p: Any) -> nn.Parameter:
    """A parameter of one's own that shares p's storage and does not require gradients, with what p knows of itself."""
    kind = next((kind for kind in KINDS if kind.parameter == type(p).__name__), QuantisedWeight)
    return kind.share(p)


class Bare:
    """original ↦ what stands for a layer's weight, for a layer that is parametrized there.

    Such a layer has its weight in the parametrization and another class, so we look at a copy that has neither.
    """

    def __init__(self, layer: nn.Module, cls: type[nn.Module], name: str):
        self.layer, self.cls, self.name = layer, cls, name

    def __call__(self, original: Tensor) -> QuantisedWeight:
        bare: nn.Module = object.__new__(self.cls)
        vars(bare).update(vars(self.layer))
        vars(bare).pop("forward", None)
        weight = {"weight": original} if original.numel() else {}
        vars(bare)["_parameters"] = {**self.layer._parameters, **weight}
        vars(bare)["_modules"] = {}  # which are the view's: a quantised layer has none of its own
        stand_in = quantised(bare, self.name)
        assert stand_in is not None
        return stand_in
