"""Direct preference optimisation (arXiv 2305.18290). The reference is the base itself, which never changes.

loss = −log σ(β [(log π(y⁺) − log π₀(y⁺)) − (log π(y⁻) − log π₀(y⁻))])
"""

import torch
from base import TEXT, encode, model
from torch.nn import functional as F

import peftfn as pf

HEAD, LENGTH, BETA = 24, 48, 0.5


def pairs(rows, step):
    """[rows, LENGTH] twice: a beginning in small letters goes on in capitals, which is preferred, or as it was."""
    starts = torch.randint(len(TEXT) - 2 * LENGTH, (rows,), generator=torch.Generator().manual_seed(step))
    cuts = [TEXT[s : s + 2 * LENGTH] for s in starts.tolist()]
    good = [encode(t[:HEAD] + t[HEAD:].upper())[:LENGTH] for t in cuts]
    return torch.stack(good), torch.stack([encode(t)[:LENGTH] for t in cuts])


def log_likelihood(logits, ids):
    """[rows]: of what follows the beginning."""
    each = F.log_softmax(logits[:, HEAD - 1 : -1], -1).gather(-1, ids[:, HEAD:, None])
    return each.sum((1, 2))


net = pf.adapt(model, {r"(q|k|v|o|up|down|gate)_proj": pf.LoRA(rank=8, alpha=16)})
a = net.init(seed=0)
optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=5e-3)
margins = []
for step in range(60):
    good, bad = pairs(8, step)
    both = torch.cat([good, bad])
    with torch.no_grad():
        reference = log_likelihood(model(both).logits, both)
    gained, lost = (log_likelihood(net.apply(a, both).logits, both) - reference).chunk(2)
    loss = -F.logsigmoid(BETA * (gained - lost)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    margins.append(BETA * (gained - lost).mean().item())
print(f"margin of the preferred text: {margins[0]:.2f} at the start, {margins[-1]:.2f} at the end")
assert margins[0] == 0 and margins[-1] > 1  # a fresh adapter is the base
