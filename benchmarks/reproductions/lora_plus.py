"""Two learning rates, one for A and one for B, and which of the two starts at zero."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf
from benchmarks.reproductions.claim import NO, PARTLY, YES, Claim, Json, table

STARTS = {"B starts at zero": "a", "A starts at zero": "b"}
"""Which factor is random then."""
RANK = 4


def teacher(width: int, samples: int = 256) -> tuple[nn.Module, Tensor, Tensor]:
    """(frozen network, inputs, outputs of the same network with another middle weight)"""
    g = torch.Generator().manual_seed(width)
    model = nn.Sequential(
        nn.Linear(16, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU(),
        nn.Linear(width, 1, bias=False),
    ).requires_grad_(False)  # fmt: skip
    for layer, scale in zip((model[0], model[2], model[4]), (2 / 16, 2 / width, 1 / width), strict=True):
        layer.weight.copy_(scale**0.5 * torch.randn(layer.weight.shape, generator=g))
    x = torch.randn(2 * samples, 16, generator=g)
    a, b = torch.randn(RANK, width, generator=g) / width**0.5, torch.randn(width, RANK, generator=g) / RANK**0.5
    h = model[1](model[0](x))
    return model, x, model[4](F.relu(model[2](h) + h @ a.mT @ b.mT))


def start(net: pf.Adapted, config: Mapping[str, Any], random: str) -> pf.Adapter:
    """A zero or B zero, and the other normal with a variance of 1 / (what it sums over)."""
    g = torch.Generator().manual_seed(int(config["seed"]))
    out = net.init(seed=int(config["seed"]))
    for leaf in out.values():
        for name, t in leaf.items():
            drawn = torch.randn(t.shape, generator=g) / t.shape[-1] ** 0.5
            leaf[name] = drawn if name == random else torch.zeros_like(t)
    return out


def run(quick: bool, folder: Path) -> Json:
    widths, exponents, seeds, steps = (64, 256), tuple(range(-13, 1)), 2, 100
    if quick:
        widths, exponents, seeds, steps = (16,), (-6, -3), 1, 2
    out: Json = {"exponents": list(exponents), "steps": steps, "loss": {}, "still": {}}
    for width in widths:
        model, x, y = teacher(width)
        net, half = pf.adapt(model, {"2.weight": pf.LoRA(rank=RANK)}), len(x) // 2
        out["still"][str(width)] = float(F.mse_loss(model(x[half:]), y[half:]))
        for name, random in STARTS.items():
            configs = pf.grid(a=[2.0**i for i in exponents], b=[2.0**i for i in exponents], seed=range(seeds))
            done = pf.sweep(
                configs,
                net,
                lambda net, a, _, x=x[:half], y=y[:half]: F.mse_loss(net.apply(a, x), y),
                lambda config, step: torch.zeros(()),  # all of the data, always: nothing to stack
                lambda c: pf.steps.chain(pf.steps.adamw(c["a"]), pf.steps.lora_plus(c["b"] / c["a"])),
                steps=steps,
                every=steps,
                slots=len(configs),
                init=partial(start, random=random),
                evaluate=lambda net, a, x=x[half:], y=y[half:]: F.mse_loss(net.apply(a, x), y),
                folder=folder / f"{width}.{random}",
            )
            out["loss"][f"{width}, {name}"] = grid(done, exponents)
    return out


def grid(done: pf.Swept, exponents: tuple[int, ...]) -> list[list[float | None]]:
    """The mean loss over the seeds, a row for each rate of A; None where one diverged."""
    of: dict[tuple[float, float], list[float]] = {}
    for t in done.trials:
        of.setdefault((t.config["a"], t.config["b"]), []).append(
            t.history[-1]["value"] if t.status == "done" else float("inf")
        )
    means = {k: sum(v) / len(v) for k, v in of.items()}
    cells = [[means[2.0**i, 2.0**j] for j in exponents] for i in exponents]
    return [[x if x < float("inf") else None for x in row] for row in cells]


def least(loss: list[list[float | None]], exponents: list[int], diagonal: bool = False) -> tuple[float, int, int]:
    """(loss, exponent of A's rate, of B's)"""
    cells = ((x, i, j) for i, row in zip(exponents, loss, strict=True) for j, x in zip(exponents, row, strict=True))
    return min((x, i, j) for x, i, j in cells if x is not None and (i == j or not diagonal))


def found(figures: Json) -> tuple[dict[str, str], str]:
    exponents, rows = figures["exponents"], []
    best, one = dict[str, tuple[float, int, int]](), dict[str, tuple[float, int, int]]()
    for name, loss in figures["loss"].items():
        best[name], one[name] = least(loss, exponents), least(loss, exponents, diagonal=True)
        x, i, j = best[name]
        y, k, _ = one[name]
        still = figures["still"][name.split(",")[0]]
        rows.append([name, f"{still:.3g}", f"{y:.3g}", f"2^{k}", f"{x:.3g}", f"2^{i}", f"2^{j}", f"2^{j - i}"])
    usual = [n for n in best if n.endswith("B starts at zero")]
    other = [n.replace("B starts", "A starts") for n in usual]
    ratios = [best[n][2] - best[n][1] for n in usual]
    verdicts = {
        "B at zero: the best rate of B is larger than that of A": _all(r > 0 for r in ratios),
        "B at zero: two rates are better than one (loss lower by a tenth or more)": _all(
            best[n][0] <= 0.9 * one[n][0] for n in usual
        ),
        "B at zero stands a larger single rate than A at zero, and is better": _all(
            one[n][1] > one[m][1] and one[n][0] < one[m][0] for n, m in zip(usual, other, strict=True)
        ),
    }
    if len(ratios) > 1:
        verdicts["B at zero: the best ratio grows with the width"] = YES if ratios[-1] > ratios[0] else NO
    head = ["width", "loss of the base", "best with one rate", "rate", "best with two", "of A", "of B", "B / A"]
    return verdicts, table(head, rows)


def _all(each: Any) -> str:
    each = list(each)
    return YES if all(each) else PARTLY if any(each) else NO


def draw(figures: Json, path: Path) -> None:
    from matplotlib.figure import Figure

    exponents, loss = figures["exponents"], figures["loss"]
    figure = Figure(figsize=(3.4 * len(loss), 3.2), layout="constrained")
    image, least_of_all = None, min(least(v, exponents)[0] / figures["still"][n.split(",")[0]] for n, v in loss.items())
    for axis, (name, cells) in zip(figure.subplots(1, len(loss), squeeze=False)[0], loss.items(), strict=True):
        still = figures["still"][name.split(",")[0]]
        values = torch.tensor([[float("nan") if x is None else x / still for x in row] for row in cells]).log10()
        lo, hi = exponents[0] - 0.5, exponents[-1] + 0.5
        image = axis.imshow(
            values, origin="lower", extent=(lo, hi, lo, hi), cmap="viridis", vmin=math.log10(least_of_all), vmax=0
        )
        _, i, j = least(cells, exponents)
        axis.plot([j], [i], "r*", markersize=10)
        axis.plot([lo, hi], [lo, hi], color="white", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set(xlabel="log₂ rate of B", ylabel="log₂ rate of A")
    figure.colorbar(image, ax=figure.axes, label="log₁₀ of loss / the base's", shrink=0.8)
    figure.savefig(path, dpi=110)


CLAIM = Claim(
    "Two learning rates, and which factor starts at zero",
    "Hayou, Ghosh and Yu, LoRA+, 2024, [arXiv:2402.12354](https://arxiv.org/abs/2402.12354), and The Impact of "
    "Initialization, 2024, [arXiv:2406.08447](https://arxiv.org/abs/2406.08447)",
    "One learning rate for A and B is not the best in wide networks: B's should be much larger, by a ratio that grows "
    "with the width. Of the two starts with B A = 0, a random A and B = 0 stands larger rates and ends better.",
    "A frozen network of three layers with ReLU; the target is the same network with a change of rank 4 in the middle "
    "layer, which a LoRA of rank 4 could be. 256 samples, 100 full steps of AdamW at constant rates, the loss on 256 "
    "others. Every pair of rates from 2⁻¹³ to 1, and two seeds, in one `vmap` of 392 adapters for each start and "
    "width. A random A has the variance 1 / width, a random B 1 / rank. The papers train real models too, and far "
    "wider ones.",
    "The paper has no thresholds; that a tenth is better is ours. The rules and the record came in one change, so "
    "that nothing shows which was first.",
    run,
    found,
    draw,
)
