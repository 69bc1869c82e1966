"""What is going on around a call: a torch.func transform, forward-mode differentiation, a compiler."""

import torch
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def eager() -> bool:
    """Whether plain eager autograd is all there is, so that a hand-written `autograd.Function` may stand in."""
    return not torch.compiler.is_compiling() and not under_transform()
