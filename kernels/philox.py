"""Dropout masks that are a function of a seed: Philox-4x32 with 7 rounds, in plain torch.

The kernels draw the same numbers where they need them, forward and backward, so that no mask is stored. Element
(row, column) takes word column mod 4 of the counter (row, column // 4, 0, 0).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def _high(a: int, b: Tensor) -> Tensor:
    """The upper 32 bits of a·b, for unsigned 32-bit values held in int64."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of counter (c0, c1, 0, 0), as int64. seed: an int64 tensor of one element."""
    c2 = c3 = torch.zeros_like(c0 + c1)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        c0, c1, c2, c3 = (
            _high(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * (c2 & 0xFFFF) + ((0xCD9E8D57 * (c2 >> 16) & 0xFFFF) << 16)) & _LOW,
            _high(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * (c0 & 0xFFFF) + ((0xD2511F53 * (c0 >> 16) & 0xFFFF) << 16)) & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """[rows, columns] of bool: False with probability p."""
    row = torch.arange(rows, device=seed.device)[:, None]
    quad = torch.arange((columns + 3) // 4, device=seed.device)[None, :]
    words = torch.stack(torch.broadcast_tensors(*philox(seed, row, quad)), -1).flatten(1)[:, :columns]
    return (words >> 8).to(torch.float32) * 2.0**-24 >= p


def fresh_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device: it obeys manual_seed, and is drawn anew in a replayed CUDA graph."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
