"""Sixteen learning rates in one run, on the demo's headlines: python -m benchmarks.sweep makes docs/sweep.png."""

from pathlib import Path
from time import perf_counter

import torch
from optree import tree_leaves, tree_map
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn.demo.data import news
from peftfn.demo.model import SPLIT, Base
from peftfn.demo.train import accuracy

PLOT = Path(__file__).parents[1] / "docs" / "sweep.png"
STEPS, BATCH = 50, 8
RATES = torch.logspace(-4, -1, 16)


def main() -> None:
    torch.manual_seed(0)
    task = news(train=400, test=200)
    base = Base(classes=len(task.labels))
    fit, test = base.encode(task, task.train), base.encode(task, task.test)
    sites = rf"^layers\.[{SPLIT}-9]\..*(query|key|value|dense)\.weight"
    net = pf.adapt(base.model, {sites: pf.LoRA(rank=8, alpha=16), "head": pf.Full()})

    start = [tree_map(lambda t: t.clone().requires_grad_(), net.init(seed=0)) for _ in RATES]  # type: ignore[arg-type]
    groups = [{"params": tree_leaves(a), "lr": lr} for a, lr in zip(start, RATES.tolist(), strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def loss(adapter: pf.Adapter, hidden: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net.apply(adapter, hidden, mask, method="upper"), label)

    losses, began = [], perf_counter()
    for step in range(STEPS):
        index = torch.randint(len(fit.label), (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = fit.hidden[index], fit.mask[index], fit.label[index]
        each = vmap(loss, (0, None, None, None))(pf.stack(start), *batch)  # [16]
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        losses.append(each.detach())
    seconds = perf_counter() - began
    done = [tree_map(Tensor.detach, a) for a in start]  # type: ignore[arg-type]
    right = accuracy(net, done, (test.hidden, test.mask), test.label, method="upper")  # type: ignore[arg-type]
    print(f"{STEPS} steps of {len(RATES)} adapters in {seconds:.0f} s")
    for lr, share in zip(RATES.tolist(), right.tolist(), strict=True):
        print(f"  {lr:.1e}  {100 * share:.1f} %")
    plot(torch.stack(losses), right)


def plot(losses: Tensor, right: Tensor) -> None:
    """losses [steps, k], right [k]"""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, other = figure.subplots(1, 2)
    colours = colormaps["viridis"](torch.linspace(0, 0.95, len(RATES)).numpy())
    smooth = losses.unfold(0, 10, 1).mean(-1)
    for i, colour in enumerate(colours):
        left.plot(range(10, 10 + len(smooth)), smooth[:, i].numpy(), color=colour, linewidth=1.2)
    left.set(xlabel="step", ylabel="training loss (mean of 10 steps)", ylim=(0, 3))
    other.semilogx(RATES.numpy(), 100 * right.numpy(), color="#4d4d4d", linewidth=1, zorder=1)
    other.scatter(RATES.numpy(), 100 * right.numpy(), c=colours, zorder=2)
    other.set(xlabel="learning rate", ylabel="held-out accuracy (%)")
    figure.suptitle("topic of a BBC headline: 16 learning rates of a LoRA in one run", fontsize=10)
    figure.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    main()
