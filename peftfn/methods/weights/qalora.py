"""QA-LoRA: W + s·B A P, where P sums the features of each group, so that a group's weights all change alike."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, lora_alpha
from peftfn.methods.parts.variant import Variant


def _written(m: "QALoRA") -> dict[str, Any]:
    if m.pool != "groups":
        raise ValueError(f'QALoRA.pool is {m.pool!r}, and PEFT has "groups" alone: give that, or scale the leaf')
    return lora_alpha(m)


@dataclass(frozen=True)
class QALoRA(Variant):
    """W + s·B A P, with A [rank, in/group], B [out, rank], P [in/group, in] the pooling of each `group` of neighbouring
    features, and s as for `LoRA`.

    Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", 2023, arXiv:2309.14717: the
    change can be taken up by the zero points of a weight quantised in such groups. Here W may be any weight; PEFT has
    it for GPTQ layers alone, and multiplies the mean of a group by the number of groups, not by their size.

    Trainable parameters per site: rank·(in/group + out). Use it for weights that will be quantised in groups: the
    change merges into the zero points.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`.
        group: features of one group.
        pool: "sum" over a group (the paper), its "mean" (the authors' other form), or "groups", PEFT's in/group means.

    Raises:
        ValueError: group does not divide the input features.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.QALoRA(rank=2, group=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0, "group": 2},
        {"rank": 3, "group": 4, "pool": "groups", "rslora": True, "init_weights": "gaussian"},
        {"rank": 2, "group": 4, "pool": "mean"},
    )

    peft = replace(
        LORA,
        fields={**LORA.fields, "group": "qalora_group_size"},
        fixed={"use_qalora": True},
        reads=lambda fields, config: fields | {"pool": "groups"},
        writes=_written,
    )

    group: PositiveInt = 16
    pool: Literal["sum", "mean", "groups"] = "sum"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        divides(self, "group", self.group, **{"in": w.shape[1]})
        return super().init(rng, w[:, :: self.group])

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        g = self.group
        factor = {"sum": 1.0, "mean": 1 / g, "groups": w.shape[1] / g**2}[self.pool]
        return {"down": p["a"].repeat_interleave(g, 1), "up": p["b"] if factor == 1 else factor * p["b"]}
