"""Image classification: a ViT learns to tell horizontal from vertical stripes, with LoRA and its fresh head in full.

For a model of your own: ViTForImageClassification.from_pretrained(name, num_labels=…), and a loader of pixel_values.
"""

import torch
from transformers import ViTConfig, ViTForImageClassification

import peftfn as pf

torch.manual_seed(0)
config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
    num_channels=1, num_labels=2,
)  # fmt: skip
model = ViTForImageClassification(config)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes of a random phase, and noise; the label says whether they are vertical."""
    labels, phase = torch.randint(0, 2, (n,)), 6.28 * torch.rand(n, 1, 1)
    rows = torch.sin(torch.arange(16.0)[None, :, None] * 1.5 + phase).expand(n, 16, 16)
    images = torch.where(labels.bool()[:, None, None], rows.mT, rows)
    return (images + 0.3 * torch.randn(n, 16, 16))[:, None], labels


net = pf.adapt(model, pf.targets(model, pf.LoRA(rank=8, alpha=16), "all-linear", task="SEQ_CLS"))
print(pf.summary(net, by_site=False))
a = net.init(seed=0)
step = pf.steps.adamw(3e-3)
state = step.init(a)


def loss(a: pf.Adapter, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return net.apply(a, images, labels=labels).loss


for _ in range(60):
    updates, state = step.update(torch.func.grad(loss)(a, *batch(32)), state, a)
    a = pf.steps.apply(a, updates)

pf.save("stripes", net, a, format="peft")
net, a = pf.load("stripes", model)
images, labels = batch(200)
accuracy = float((net.apply(a, images).logits.argmax(-1) == labels).float().mean())
print(f"accuracy {accuracy:.2f}")
assert accuracy > 0.9
