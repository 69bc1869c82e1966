"""GRPO (arXiv 2402.03300): rewards within a group of answers, and the base as the reference policy.

loss = −E[A log π(y)] + β KL(π ‖ π₀), A = (r − mean r)/std r in each group; KL by its estimator r − log r − 1, r = π₀/π.
"""

import torch
from base import LETTERS, batch, model
from torch.nn import functional as F

import peftfn as pf

HEAD, NEW, GROUP, BETA = 12, 16, 8, 0.02
net = pf.adapt(model, {r"(q|k|v|o|up|down|gate)_proj": pf.LoRA(rank=8, alpha=16)})
a = net.init(seed=0)
optimizer = torch.optim.AdamW([p.requires_grad_() for p in pf.leaves(a)], lr=3e-3)
spaces = torch.tensor([c == " " for c in LETTERS])


def reward(answers):
    """[rows]: the share of spaces. It stands for a judge."""
    return spaces[answers].float().mean(1)


def log_likelihoods(logits, ids):
    """[rows, new tokens]"""
    return F.log_softmax(logits[:, HEAD - 1 : -1], -1).gather(-1, ids[:, HEAD:, None])[..., 0]


torch.manual_seed(0)
rewards = []
for step in range(25):
    prompts = batch(4, step, length=HEAD).repeat_interleave(GROUP, 0)
    with torch.no_grad():
        ids = net.apply(a, prompts, max_new_tokens=NEW, do_sample=True, top_k=0, method="generate")
        reference = log_likelihoods(model(ids).logits, ids)
    r = reward(ids[:, HEAD:])
    groups = r.view(-1, GROUP)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    log_p = log_likelihoods(net.apply(a, ids).logits, ids)
    ratio = reference - log_p
    loss = (-advantage * log_p + BETA * (ratio.exp() - ratio - 1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rewards.append(r.mean().item())
first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
print(f"reward: {first:.2f} in the first five steps, {last:.2f} in the last five")
assert last > first + 0.1
