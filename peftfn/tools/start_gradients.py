"""Starting points made of the gradients of a loss, which stream: see `starts.py`."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.numbers import above_zero, checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted, check_net
from peftfn.tools.observe import gradients
from peftfn.tools.start_nets import loras_of, offset_from, with_leaves

Loss = Callable[[Any, Any], Tensor]
"""(the model's output, the batch) ↦ a scalar"""


@checks_numbers
def lora_ga(
    net: Adapted, batches: Iterable[Any], *, loss: Loss | None = None, gamma: float = 16.0
) -> tuple[Adapted, Adapter]:
    """Start at singular vectors of the loss's gradient G = U S Vᵀ: the first step is then close to full fine-tuning's.

    Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000.
    A₀ = (out^¼/√γ) V_{1…r}ᵀ and B₀ = (out^¼/√γ) U_{r+1…2r}, as in the authors' code. (PEFT scales B₀ alone, and by the
    singular values too.)

    Memory: a gradient of every adapted weight.

    Args:
        net: a net of LoRAs at linear layers, of ranks of at most half of the weights' smaller side.
        batches: as for `eva`; the gradients' mean over them counts.
        loss: (output, batch) ↦ a scalar; None: the output's `loss`.
        gamma: the start is the smaller, the larger it is.

    Returns:
        (net, adapter): a net of `OffsetLoRA`, and the start, which is the identity.

    Raises:
        ValueError: gamma is not above 0, a rank is too large, there are no batches, or no loss; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.lora_ga(net, [torch.randn(3, 8)], loss=lambda out, batch: out.square().mean())
    """
    check_net("lora_ga", net)
    above_zero("lora_ga", gamma=gamma)
    loras = loras_of("lora_ga", net)
    for n, (entry, m) in loras.items():
        if 2 * m.rank > min(entry.site.matrix_shape()):
            most = min(entry.site.matrix_shape()) // 2
            raise ValueError(f"{n}: rank is {m.rank}, and lora_ga takes twice as many singular vectors: give <= {most}")
    starts: dict[str, Leaf] = {}
    for n, g in gradients("lora_ga", net, loras, batches, loss).items():
        r, size = loras[n][1].rank, g.shape[0] ** 0.25 / sqrt(gamma)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        starts[n] = {"a": size * vh[:r], "b": size * u[:, r : 2 * r]}
    return offset_from(net, starts)


@checks_numbers
def lora_one(
    net: Adapted, batches: Iterable[Any], *, loss: Loss | None = None, gamma: float = 128.0
) -> tuple[Adapted, Adapter]:
    """Start at the largest components of the negative gradient −G = U S Vᵀ: B A is one step of gradient descent.

    Zhang, Liu and Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably
    and Efficiently", 2025, arXiv:2502.01235. A₀ = √(S/(S₁γ)) Vᵀ and B₀ = U √(S/(S₁γ)), of the rank largest. Nothing is
    subtracted, so the start is not the identity: this is the point of it.

    Memory: a gradient of every adapted weight.

    Args:
        net: a net of LoRAs at linear layers.
        batches, loss: as for `lora_ga`.
        gamma: the step is the smaller, the larger it is.

    Returns:
        (net, adapter): the net given, and the start.

    Raises:
        ValueError: gamma is not above 0, a rank is too large, there are no batches, or no loss; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.lora_one(net, [torch.randn(3, 8)], loss=lambda out, batch: out.square().mean())
    """
    check_net("lora_one", net)
    above_zero("lora_one", gamma=gamma)
    loras = loras_of("lora_one", net)
    leaves: Adapter = {}
    for n, g in gradients("lora_one", net, loras, batches, loss).items():
        r = loras[n][1].rank
        u, s, vh = torch.linalg.svd(-g, full_matrices=False)
        root = (s[:r] / (s[0].clamp(min=torch.finfo(s.dtype).tiny) * gamma)).sqrt()
        leaves[n] = {"a": root[:, None] * vh[:r], "b": u[:, :r] * root}
    return net, with_leaves(net, leaves)
