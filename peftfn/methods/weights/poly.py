"""Poly: low-rank changes mixed from skills, by each task's own weights of the skills. A task is an adapter."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import LINEAR, Cases, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored


@dataclass(frozen=True)
class Poly(Factored):
    """W + (1/rank) B A, A = Σ_s m_s A_s [rank, in] and B = Σ_s m_s B_s [out, rank], m = σ(z) / Σ_s σ(z_s). With several
    splits, each slice of the inputs (for A) and outputs (for B) has an m of its own: multi-head routing.

    Ponti et al., "Combining Modular Skills in Multitask Learning", 2022, arXiv:2202.13914; splits: Caccia et al.,
    "Multi-Head Adapter Routing for Cross-Task Generalization", 2023, arXiv:2211.03831.

    Trainable parameters per site: skills·rank·(in + out) + splits·skills. Use it for many tasks that share skills.
    **A task is an adapter**, with z of its own: tasks that share their skills are a `pf.stack` in which A_s and B_s are
    one tensor expanded, so that its gradient sums over the tasks; a batch of several tasks is
    `net.mixed(tasks, task_ids, …)`.

    Args:
        rank: inner dimension; s = 1/rank.
        skills: how many A_s and B_s there are.
        splits: into how many slices the features are cut; divides in and out.
        relaxed: in train mode, draw m from the relaxed Bernoulli distribution of temperature 1, as PEFT does.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.Poly(rank=2, skills=3)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    kinds: ClassVar = LINEAR
    cases: ClassVar[Cases] = (
        {"rank": 2, "skills": 2, "splits": 2, "relaxed": False},
        {"rank": 3, "skills": 3, "relaxed": False},
    )
    in_eval = (("relaxed", False),)

    peft = Peft(
        "POLY",
        {"a": "poly_lora_A", "b": "poly_lora_B", "z": "poly_router.module_logits"},
        {"rank": "r", "skills": "n_skills", "splits": "n_splits"},
        fixed={"poly_type": "poly"},
        leaf_to=lambda m, p: m.peft.named({**p, "z": p["z"][None]}),  # of one task
    )

    rank: PositiveInt = 8
    skills: PositiveInt = 4
    splits: PositiveInt = 1
    relaxed: bool = True

    @property
    def scale(self) -> float:
        return 1 / self.rank

    @property
    def exact_gradient(self) -> bool:
        return not self.relaxed

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), q, n, r = w.shape, self.splits, self.skills, self.rank
        divides(self, "splits", q, out=out, **{"in": in_})
        return {
            "a": rng.uniform(q, n, in_ // q, r, bound=(3 / in_) ** 0.5),
            "b": rng.zeros(q, n, r, out // q),
            "z": rng.uniform(q * n, bound=1e-3),
        }

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        z = p["z"]
        if self.relaxed:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + torch.log(u) - torch.log1p(-u)
        m = z.sigmoid().view(self.splits, self.skills)
        m = m / (m.sum(-1, keepdim=True) + 1e-12)
        down = torch.einsum("qs,qsdr->qdr", m, p["a"]).flatten(0, 1).mT  # [r, in]
        up = torch.einsum("qs,qsrd->qrd", m, p["b"]).movedim(0, 1).flatten(1).mT  # [out, r]
        return {"down": down, "up": up}
