"""Everything of a model that a call could write, as a value to compare with."""

from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
OPAQUE = (nn.Module, FunctionType, ModuleType, type)
DEEP = 4


def state(model: nn.Module) -> dict[str, Any]:
    """{module: {attribute: value}}: parameters, buffers, hooks, modes and whatever else its modules hold."""
    memo: dict[int, Any] = {}
    return {path: frozen(vars(m), memo) for path, m in model.named_modules(remove_duplicate=False)}


def frozen(value: Any, memo: dict[int, Any], depth: int = 0) -> Any:
    """What containers, tensors and plain objects hold now; anything else is itself, and compared with `is`."""
    if isinstance(value, (PLAIN, OPAQUE)) or depth > DEEP:
        return value
    if id(value) not in memo:
        memo[id(value)] = value  # for what contains itself
        memo[id(value)] = _frozen(value, memo, depth + 1)
    return memo[id(value)]


def _frozen(value: Any, memo: dict[int, Any], depth: int) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            return value
        flat = value.detach().reshape(-1).contiguous()
        bits = Bits(flat.clone().view(torch.uint8) if flat.numel() else flat)
        marks = {"version": value._version, "requires_grad": value.requires_grad, "grad": value.grad is not None}
        return {"itself": value if isinstance(value, nn.Parameter) else None, "bits": bits, **marks}
    if isinstance(value, dict):
        return {k: frozen(v, memo, depth) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(v, memo, depth) for v in value]
    if isinstance(value, set | frozenset):
        return dict.fromkeys(value)
    if type(getattr(value, "__dict__", None)) is dict:
        return {"itself": Same(value), **frozen(vars(value), memo, depth)}
    return value


class Bits:
    """A tensor's bits."""

    def __init__(self, bits: Tensor):
        self.bits = bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "bits"


class Same:
    """One object and no other, kept so that its id is not given away."""

    def __init__(self, it: Any):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return type(self.it).__name__


def difference(before: Any, after: Any, path: str = "") -> str:
    """Words for the first difference, empty if there is none."""
    if isinstance(before, dict) and isinstance(after, dict):
        for k in [*before, *(k for k in after if k not in before)]:
            here = f"{path}.{k}" if path else str(k)
            if k not in after or k not in before:
                return f"{here} is {'gone' if k not in after else 'new'}"
            if words := difference(before[k], after[k], here):
                return words
        return "" if list(before) == list(after) else f"the order of {path} is another"
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return f"{path} has {len(after)} entries instead of {len(before)}"
        return next(
            (w for i, p in enumerate(zip(before, after, strict=True)) if (w := difference(*p, f"{path}[{i}]"))), ""
        )
    if before is after or (
        isinstance(before, (*PLAIN, Bits, Same)) and type(before) is type(after) and before == after
    ):
        return ""
    if isinstance(before, float) and before != before and isinstance(after, float) and after != after:
        return ""
    return f"{path} is {str(after)[:60]!r} instead of {str(before)[:60]!r}"
