"""What stands in a parameter's slot between calls: whatever computes with it has outlived its call."""

from typing import Any

import torch
from torch import Tensor

from peftfn.slots.slot import OUTLIVED


class Released(Tensor):
    """Stands in a parameter's slot between calls: whatever computes with it has outlived its call.

    An empty tensor on the meta device rather than any object, because the compiler takes stock of all parameters.
    """

    site: str

    @classmethod
    def of(cls, name: str) -> "Released":
        t = torch.empty(0, device="meta").as_subclass(cls)
        t.site = name
        return t

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = getattr(getattr(func, "__self__", None), "__name__", "") in _VIEWS
        if (getattr(func, "__name__", "") in _LOOKS and not view) or torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        found = next((t for t in [*args, *(kwargs or {}).values()] if isinstance(t, Released)), None)
        raise RuntimeError(found.told(found.site) if found is not None else cls.told("an adapted weight"))

    @classmethod
    def told(cls, name: str) -> str:
        return OUTLIVED.format(name=name)


class Bypass(Released):
    """Stands for an adapted parameter in a list or dict of the model, where a call would read it unadapted."""

    @classmethod
    def told(cls, name: str) -> str:
        return (
            f"{name}: the model reads this parameter from a list, a dict or a function of its own, and not from its "
            "module, so no adapter would reach it. Read it from the module, or leave this site out of the rules."
        )


class Waiting(Released):
    """Stands for a parameter that a hook puts in place when its layer is called (offload, layerwise casting)."""

    make: Any = None  # what makes the values at some sites, where the parameter is adapted; see `Loading.wait`

    @classmethod
    def like(cls, name: str, t: Tensor, dtype: torch.dtype) -> "Waiting":
        out = torch.empty(t.shape, dtype=dtype, device="meta").as_subclass(cls)
        out.site = name
        return out

    @classmethod
    def told(cls, name: str) -> str:
        return (
            f"{name}: the model reads this parameter outside of the forward of its layer, and a hook of accelerate or "
            "diffusers puts it in place for that forward alone. Read it there, or load the model without offload."
        )


_LOOKS = frozenset(
    ["__get__", "__set__", "size", "stride", "dim", "storage_offset", "is_floating_point", "is_complex", "numel"]
)
_VIEWS = frozenset(["T", "mT", "H", "mH", "data"])  # attributes that are the values themselves
