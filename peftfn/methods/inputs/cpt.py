"""CPT: the embeddings of a context, each moved by a bounded step; and its loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Tokens
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class CPT(Tokens):
    """cat[E(context) + proj(δ), E(ids)] in place of E(ids), δ [n, d] trained; proj shortens each row of δ to at most
    ε·√(d/2048), with the gradient of δ itself.

    Blau et al., "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", 2024,
    arXiv:2410.17222. Its loss counts the context's answers too (`cpt_loss`), so the output keeps the positions of the
    context.

    Trainable parameters per site: n·d, for a context of n tokens. Use it with few examples, given as the context.

    Args:
        ids: the context's tokens.
        types: of each of them, as PEFT numbers them: 1 and 3 (mod 4) templates, 2 inputs, 0 answers, which do not move.
            None: all are inputs.
        epsilon: ε of inputs.
        format_epsilon: ε of templates.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.CPT(ids=(1, 2, 3))})
        logits = net.apply(net.init(seed=0), torch.tensor([[4, 5]])).logits
        assert logits.shape == (1, 5, 9)
    """

    cases: ClassVar[Cases] = ({"ids": (1, 2, 3)}, {"ids": (3, 1), "types": (1, 2), "epsilon": 0.5})
    keep: ClassVar[bool] = True

    ids: tuple[int, ...] = (0,)
    types: tuple[int, ...] | None = None
    epsilon: Positive = 0.1
    format_epsilon: Positive = 0.1

    identity = False  # type: ignore[assignment]
    exact_gradient = False  # type: ignore[assignment]  # the projection passes it on unchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ids or (self.types is not None and len(self.types) != len(self.ids)):
            raise ValueError(f"CPT.ids has {len(self.ids)} tokens, and types {self.types}: give a type for each token")

    def init(self, rng: Rng, m: Place) -> Leaf:
        return {"delta": rng.zeros(len(self.ids), m.width)}

    def frozen(self, rng: Rng, m: Place) -> Leaf:
        most = {0: 0.0, 1: self.format_epsilon, 2: self.epsilon, 3: self.format_epsilon}
        steps = [most[t % 4] * (m.width / 2048) ** 0.5 for t in self.types or [2] * len(self.ids)]
        bounds = torch.cat([rng.full(1, value=step) for step in steps])[:, None]
        if rng.meta:
            return {"context": rng.empty(len(self.ids), m.width), "bounds": bounds}
        weight: Tensor = m.embedding().weight.detach()  # type: ignore[operator]
        if not all(0 <= i < len(weight) for i in self.ids):
            raise ValueError(f"CPT.ids is {self.ids}: give ids of tokens, from 0 to {len(weight) - 1}")
        return {"context": weight[torch.tensor(self.ids, device=weight.device)].to(rng.dtype), "bounds": bounds}

    def tokens(self, p: Leaf, m: Place) -> Tensor:
        d, bounds = p["delta"] * (p["bounds"] > 0), p["bounds"]
        size = d.square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
        return p["context"] + d + (d * (bounds / size).clamp(max=1) - d).detach()


def cpt_loss(
    logits: Tensor, labels: Tensor, context: Sequence[int], types: Sequence[int], decay: float | None = None
) -> Tensor:
    """Return CPT's loss: the mean of weighted cross entropies over the answers, those of the context too.

    Args:
        logits: [rows, n + tokens, vocabulary], the output for a context of n tokens.
        labels: [rows, tokens]; −100 does not count.
        context, types: the ids and types of the `CPT` method. Types above 0 that 4 divides are answers; each example
            has a type of its own, later ones larger.
        decay: an answer of the context weighs decay to the power of the answers after it, the row's own being the
            last; None: all weigh 1.

    Returns:
        The mean over all tokens that count.

    Example:
        from peftfn.methods.inputs.cpt import cpt_loss
        loss = cpt_loss(torch.randn(2, 5, 9), torch.tensor([[1, 2], [3, 4]]), [1, 2, 3], [1, 2, 4])
    """
    answers = [t > 0 and t % 4 == 0 for t in types]
    later = sorted({t for t, answer in zip(types, answers, strict=True) if answer}, reverse=True)
    weights = [
        1.0 if decay is None or not a else decay ** (1 + later.index(t)) for t, a in zip(types, answers, strict=True)
    ]
    ids = [i if answer else -100 for i, answer in zip(context, answers, strict=True)]
    rows = len(labels)
    target = torch.cat([torch.tensor(ids, device=labels.device).expand(rows, -1), labels], 1)[:, 1:]
    front = torch.tensor(weights, dtype=logits.dtype, device=labels.device).expand(rows, -1)
    weight = torch.cat([front, torch.ones(labels.shape, dtype=logits.dtype, device=labels.device)], 1)[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none", ignore_index=-100)
    counted = target != -100
    return (each * weight * counted).sum() / counted.sum()
