r"""Diffusion: a tiny UNet learns to denoise small digits 0 to 4, and a LoRA of it the others, on scikit-learn's digits.

For a pipeline of diffusers: net = pf.adapt(pipe.unet, {r"to_[qkv]\.weight|to_out": pf.LoRA(rank=8)}), the same loss
with its scheduler's add_noise, and pipe.unet = pf.as_module(net, a) to sample. pf.load reads kohya's files and theirs.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import peftfn as pf

torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # [n, 1, 8, 8] in [−1, 1]
known, new = images[data.target < 5], images[data.target >= 5]
kept = torch.linspace(0.999, 0.02, 50)  # of the signal's variance, at each step of the noise


class UNet(nn.Module):
    def __init__(self, n: int = 32):
        super().__init__()
        self.time, self.into = nn.Embedding(50, n), nn.Conv2d(1, n, 3, padding=1)
        self.down, self.middle = nn.Conv2d(n, n, 3, stride=2, padding=1), nn.Conv2d(n, n, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(n, n, 2, stride=2), nn.Conv2d(2 * n, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        high = F.silu(self.into(x) + self.time(t)[..., None, None])
        low = F.silu(self.middle(F.silu(self.down(high))))
        return self.out(torch.cat([high, F.silu(self.up(low))], 1))


def loss(predict, x: torch.Tensor, n: int = 64) -> torch.Tensor:
    """How far the predicted noise is from the one that was added."""
    x, t, noise = x[torch.randint(len(x), (n,))], torch.randint(50, (n,)), torch.randn(n, 1, 8, 8)
    signal = kept[t][:, None, None, None]
    return F.mse_loss(predict(signal.sqrt() * x + (1 - signal).sqrt() * noise, t), noise)


model = UNet()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(120):
    optimizer.zero_grad()
    loss(model, known).backward()
    optimizer.step()

net = pf.adapt(model, {"into|down|middle|out": pf.LoRA(rank=8)})
a = net.init(seed=0)
step = pf.steps.adamw(1e-2)
state = step.init(a)
for _ in range(80):
    updates, state = step.update(torch.func.grad(lambda a: loss(lambda x, t: net.apply(a, x, t), new))(a), state, a)
    a = pf.steps.apply(a, updates)
with torch.no_grad():
    before, after = (float(loss(f, new, 2000)) for f in (model, lambda x, t: net.apply(a, x, t)))
print(f"loss on new digits: base {before:.3f}, adapted {after:.3f}")
assert after < before
