"""Swap adapters under torch.compile: another adapter is another argument, and nothing compiles again."""

import torch
from base import batch, model
from optree import tree_map

import peftfn as pf

net = pf.adapt(model, {r"(q|v)_proj": pf.LoRA(rank=8)})
graphs = []


def counted(graph, inputs):
    """A backend that counts. For speed, leave the backend out."""
    graphs.append(graph)
    return graph.forward


@torch.compile(fullgraph=True, backend=counted)
def logits(a, ids):
    return net.apply(a, ids, use_cache=False).logits


ids = batch(2, step=0, length=16)
for seed in range(5):
    a = tree_map(lambda t: t + 0.1 * torch.randn_like(t), net.init(seed))  # stands for a trained one
    torch.testing.assert_close(logits(a, ids), net.apply(a, ids).logits)

small = pf.adapt(model, {r"q_proj": pf.LoRA(rank=4, alpha=2, init_weights="random")})  # another rank, fewer sites
a = small.init(seed=9)
fitted = pf.conform(a, small, net)  # exactly the same function, in the shapes of `net`
torch.testing.assert_close(logits(fitted, ids), small.apply(a, ids).logits, atol=1e-5, rtol=1e-4)
print(f"6 adapters, {len(graphs)} compilation")
assert len(graphs) == 1
