"""Many tenants in one run: each row of a batch trains its own tenant's adapter, on one base."""

import torch
from base import batch, decode, encode, model
from optree import tree_map
from torch.nn import functional as F

import peftfn as pf

STYLES = {
    "capitals": str.upper,
    "no vowels": lambda t: "".join(c for c in t if c not in "aeiou"),
    "swapped": str.swapcase,
}
net = pf.adapt(model, {r"(q|k|v|o|up|down|gate)_proj": pf.LoRA(rank=8, alpha=16)})
tenants = pf.stack([net.init(seed) for seed in range(len(STYLES))])  # one tree, each tensor [3, …]
tenants = tree_map(lambda t: t.requires_grad_(), tenants)
optimizer = torch.optim.AdamW(pf.leaves(tenants), lr=1e-2)
index = torch.arange(3).repeat_interleave(8)  # row i belongs to tenant index[i]


def loss_of_each(ids):
    """[tenants]"""
    logits = net.mixed(tenants, index, ids).logits[:, :-1]
    rows = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    return rows.view(len(STYLES), -1).mean(1)


def texts(step):
    return torch.cat([batch(8, step, style) for style in STYLES.values()])


first = loss_of_each(texts(-1)).detach()
for step in range(100):
    optimizer.zero_grad()
    loss_of_each(texts(step)).sum().backward()  # tenants do not meet in the sum: each gets its own gradient
    optimizer.step()
last = loss_of_each(texts(-1)).detach()

prompt = encode("The value of the ").expand(3, -1)
said = net.mixed(tenants, [0, 1, 2], prompt, max_new_tokens=24, do_sample=False, method="generate")
for name, before, after, ids in zip(STYLES, first, last, said, strict=True):
    print(f"{name:>10}: {before:.2f} → {after:.2f}  {decode(ids)!r}")
assert (last < 0.8 * first).all()

for name, a in zip(STYLES, pf.unstack(tenants), strict=True):
    pf.save(f"tenants/{name}", net, a, format="peft")
