"""Multitask prompt tuning: a prompt that tasks share, times a low-rank matrix of each task. A task is an adapter."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Tokens
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class MultitaskPrompt(Tokens):
    """cat[P ⊙ (C R), E(ids)] in place of E(ids): P [n, d] of all tasks, C [n, rank] and R [rank, d] of one.

    Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", 2023, arXiv:2303.02861.

    Trainable parameters per site: n·d, and rank·(n + d) for each task. Use it where tasks have a prompt in common.
    **A task is an adapter**: tasks that share P are a `pf.stack` in which "shared" is one tensor expanded, so that its
    gradient sums over the tasks; a batch of several tasks is `net.mixed(tasks, task_ids, …)`.

    Args:
        n: virtual tokens.
        rank: of the tasks' matrices.
        pooled: as for `PromptTuning`.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.MultitaskPrompt(n=3)})
        a, b = (net.init(seed=s)["model"] for s in (0, 1))
        net.mixed(pf.stack([{"model": a}, {"model": {**b, "shared": a["shared"]}}]), [1, 0], torch.ones(2, 3).long())
    """

    cases: ClassVar[Cases] = ({"n": 3}, {"n": 2, "rank": 2})

    n: PositiveInt = 8
    rank: PositiveInt = 1
    pooled: Literal["token", "virtual"] = "token"

    identity = False  # type: ignore[assignment]

    def init(self, rng: Rng, m: Place) -> Leaf:
        cols, rows = rng.normal(self.n, self.rank, std=0.02), rng.normal(self.rank, m.width, std=0.02)
        return {"shared": rng.normal(self.n, m.width), "cols": cols, "rows": rows}

    def tokens(self, p: Leaf, m: Place) -> Tensor:
        return p["shared"] * (p["cols"] @ p["rows"])
