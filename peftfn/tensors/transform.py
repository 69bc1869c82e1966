"""What is going on around a call: a torch.func transform, forward-mode differentiation, a compiler."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    if forward_ad._current_level >= 0:
        return True
    return (
        torch._C._functorch.maybe_current_level() is not None
        and not torch._C._dispatch_tls_is_dispatch_key_excluded(
            torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode  # by `outside`
        )
    )


def level() -> int | None:
    """Which torch.func transform is the innermost; None for none, and while compiling, where there is no number."""
    return None if torch.compiler.is_compiling() else torch._C._functorch.maybe_current_level()  # type: ignore[no-any-return]


def inference() -> bool:
    """Whether tensors that are made now can be in no graph later. (What is compiled is made anew in each call.)"""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def eager(x: Tensor) -> bool:
    """Whether plain autograd is all there is around x, no autocast either: a hand-written Function may stand in."""
    if torch.compiler.is_compiling():  # first: the compiler cannot trace what follows
        return False
    # asked at every product, so in one Python call: `under_transform` is written out
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    return not (torch._C._is_any_autocast_enabled() and autocast(x))


def autocast(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # asked at every product, and cheaper than the question per device
        return False
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off: what depends on parameters alone is computed in their own precision."""
    return torch.autocast(x.device.type, enabled=False) if autocast(x) else nullcontext()


def backward_task() -> int:
    """Which backward pass this code runs in; −1 outside of any."""
    return torch._C._current_graph_task_id()


def in_function() -> bool:
    """Whether this code runs in the forward of a torch.autograd.Function, which turns forward-mode off.

    So does torch.inference_mode, under which there is no gradient to lose.
    """
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


@contextmanager
def lasting() -> Iterator[None]:
    """What is made inside outlives torch.inference_mode: a tensor of that mode can never be part of a graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def outside() -> AbstractContextManager[Any]:
    """Whatever transform is around: what is made inside depends on nothing that it follows, so it is a constant there.

    vmap would refuse to draw it, and a transform hides its storage, which `check_own` looks at.
    """
    return torch._C._DisableFuncTorch() if torch._C._functorch.maybe_current_level() is not None else nullcontext()


@contextmanager
def building() -> Iterator[None]:
    """Modules that are made inside are those of no transform, and outlive the call: their makers may do what a
    transform forbids."""
    allowed = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        with lasting(), outside():
            yield
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(allowed)


def moment() -> tuple[int, bool]:
    """(`backward_task`, `in_function`); nothing special while compiling."""
    return (-1, False) if torch.compiler.is_compiling() else (backward_task(), in_function())
