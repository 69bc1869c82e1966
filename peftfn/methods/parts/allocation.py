"""AdaLoRA's allocator: which triplets of all sites are kept, as pure functions of a state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.methods.parts.sites import Planned, sites_of
from peftfn.methods.weights.adalora import AdaLoRA


@dataclass(frozen=True)
class Allocation:
    """What the allocator knows after a step: averages of the shape of the leaves, and which triplets are kept."""

    method: AdaLoRA
    importance: dict[str, Leaf]
    uncertainty: dict[str, Leaf]
    kept: dict[str, Tensor]  # site → bool [rank]

    @classmethod
    def start(cls, net: Planned, adapter: Mapping[str, Leaf]) -> "Allocation":
        """Before the first step. The net's AdaLoRA sites share one budget.

        Raises:
            ValueError: the net has no AdaLoRA; its method has no schedule, or two sites have different ones.
        """
        methods = sites_of(net, AdaLoRA)
        (first, method), *_ = methods.items()
        if method.total_steps is None or method.target_rank > method.rank:
            raise ValueError(f"{method} has no schedule to follow: give total_steps, and target_rank <= rank")
        for site, other in methods.items():
            if replace(other, rank=method.rank, alpha=None) != replace(method, alpha=None):
                raise ValueError(
                    f"{site}: {other} has another schedule than {method} at {first}, and all sites share one budget: "
                    "give all AdaLoRA rules the same fields, but for rank and alpha"
                )
        zero = {n: {k: torch.zeros_like(t) for k, t in adapter[n].items()} for n in methods}
        return cls(method, zero, zero, {n: torch.ones_like(p["e"], dtype=torch.bool) for n, p in zero.items()})

    def budget(self, step: int) -> int:
        """Triplets that all sites together keep at a step: a cubic from all of them to target_rank a site."""
        m, start = self.method, sum(t.numel() for t in self.kept.values())
        end = m.target_rank * sum(t[..., 0].numel() for t in self.kept.values())
        left = 1 - (step - m.warmup) / ((m.total_steps or 0) - m.final - m.warmup)
        return int((start - end) * min(max(left, 0.0), 1.0) ** 3 + end)


@torch.no_grad()
def allocate(
    state: Allocation, adapter: Mapping[str, Leaf], grads: Mapping[str, Leaf], step: int
) -> tuple[Allocation, dict[str, Leaf]]:
    """(state, adapter) after optimizer step number `step` (from 0), with E zero where a triplet is not kept.

    grads: those the step was taken with. Importance of an entry is |value · gradient|, averaged; its score is that
    average times the average of its own fluctuation; a triplet's is E's plus the means over its row of A and column
    of B. Entries that were set to zero may grow again until the last choice.
    """
    m = state.method
    last = (m.total_steps or 0) - m.final
    if step < last:

        def smooth(old: Mapping[str, Leaf], new: Mapping[str, Leaf], beta: float) -> dict[str, Leaf]:
            return {n: {k: beta * t + (1 - beta) * new[n][k] for k, t in p.items()} for n, p in old.items()}

        now = {n: {k: (adapter[n][k] * grads[n][k]).abs() for k in p} for n, p in state.importance.items()}
        mean = smooth(state.importance, now, m.beta1)
        change = {n: {k: (t - mean[n][k]).abs() for k, t in p.items()} for n, p in now.items()}
        state = replace(state, importance=mean, uncertainty=smooth(state.uncertainty, change, m.beta2))
    if step == last or (m.warmup < step < last and step % m.interval == 0):
        score = {}
        for n, p in state.importance.items():
            s = {k: t * state.uncertainty[n][k] for k, t in p.items()}
            score[n] = s["e"] + s["a"].mean(-1) + s["b"].mean(-2)
        every = torch.cat([s.flatten() for s in score.values()])
        drop = every.numel() - state.budget(step)
        bar = every.kthvalue(drop).values if drop else every.new_tensor(-1.0)
        state = replace(state, kept={n: s > bar for n, s in score.items()})
    elif step <= last:
        return state, dict(adapter)
    masked = {n: {**adapter[n], "e": adapter[n]["e"] * kept} for n, kept in state.kept.items()}
    return state, {**adapter, **masked}
