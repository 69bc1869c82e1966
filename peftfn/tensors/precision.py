"""In which precision values are computed."""

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """A floating tensor in fp32, or in its own dtype if that is wider; anything else as it is."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
