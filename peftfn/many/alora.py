"""Activated LoRA: gates that are 1 from an adapter's invocation tokens on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peftfn.tensors.sequence import from_last


def alora_gates(
    input_ids: Tensor, invocations: Sequence[Sequence[int] | None], index: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Return the gates of activated LoRA: an adapter acts from the last occurrence of its invocation tokens on.

    Greenewald et al., "Activated LoRA", 2025, arXiv:2504.12397. The base alone computes the tokens before the
    invocation, so their cached keys and values are those of the base. A row without the invocation uses the base: its
    gates are 0, also that of the last token. Calls with `pf.ALoRA` have these gates of their own `input_ids`; pass them
    to `net.gated` where a call has none.

    Args:
        input_ids: [rows, tokens].
        invocations: the invocation tokens of each adapter; None for one that acts everywhere.
        index: [rows], the adapter of each row, −1 being the base; None: every adapter in every row.

    Returns:
        Gates for `net.gated`, [rows, tokens, adapters]: 1 from the first token of the last occurrence on, else 0.

    Raises:
        ValueError: input_ids or index of another shape, or an empty invocation.

    Example:
        gates = pf.alora_gates(torch.tensor([[5, 7, 8, 9]]), [[7, 8]])
        assert gates[0, :, 0].tolist() == [0, 1, 1, 1]
    """
    if input_ids.dim() != 2:
        raise ValueError(f"alora_gates: input_ids have shape {list(input_ids.shape)}; give [rows, tokens]")
    (rows, tokens), gates = input_ids.shape, []
    for k, wanted in enumerate(invocations):
        if wanted is None:
            gates.append(torch.ones(rows, tokens, device=input_ids.device))
            continue
        if not len(wanted):
            raise ValueError(f"alora_gates: invocation {k} is empty; give its tokens, or None to act everywhere")
        gates.append(from_last(input_ids, wanted))
    out = torch.stack(gates, -1)
    if index is None:
        return out
    chosen = torch.as_tensor(index, device=input_ids.device)
    if chosen.shape != (rows,):
        raise ValueError(f"alora_gates: index has shape {list(chosen.shape)}; give one entry for each of {rows} rows")
    return out * (chosen[:, None] == torch.arange(len(invocations), device=input_ids.device))[:, None]
