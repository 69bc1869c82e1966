"""Tokens of each tenant × number of tenants: what one pass for all takes of a pass for each, training and serving.

The figures depend on the machine's load less than times do: both ways take turns in one process (`harness`).
"""

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import peftfn as pf
from benchmarks.harness import OURS, REPEATS, Json, Options, row
from benchmarks.llama import loss_of, quiet
from benchmarks.models import RULE, agree, llama, method

APART = "a pass each"
TENANTS, TOKENS = (2, 8, 32), (1, 8, 32, 128, 512)
MOST = 4096
"""Tokens of a pass: beyond, nothing changes, and it takes long."""
WHERE = "4-layer Llama, d 256, 28 sites, LoRA r16"
PLOT = Path(__file__).parents[1] / "docs" / "tenants.png"
PAGE = Path(__file__).parents[1] / "docs" / "many.md"
KINDS = {
    "training": "the gradient of each tenant, by `vmap` over a stack, which is how `pf.sweep` trains",
    "training in a mixed batch": "the gradient of each tenant, by `net.mixed`",
    "serving": "the forward pass of each tenant, by `net.mixed`",
}


class Tenants:
    """Adapters of one net, apart and stacked, each with its own tokens."""

    def __init__(self) -> None:
        self.net = pf.adapt(llama(4, 256, 704, 4, attn_implementation="eager").eval(), {RULE: method(dora=False)})
        self.adapters = [self.net.init(seed) for seed in range(max(TENANTS))]
        for t in (t for a in self.adapters for t in pf.leaves(a)):
            t += 0.02 * torch.randn_like(t)

    def loss(self, adapter: pf.Adapter, ids: Tensor) -> Tensor:
        return loss_of(self.net.apply(adapter, ids, use_cache=False))

    def training(self, ids: Tensor) -> dict[str, Any]:
        """ids [k, 1, tokens]"""
        mine = [_trained(a) for a in self.adapters[: len(ids)]]
        stacked = _trained(pf.stack(mine))
        return {
            OURS: lambda: _gradient(vmap(self.loss)(stacked, ids).sum(), stacked),
            APART: lambda: [_gradient(self.loss(a, x), a) for a, x in zip(mine, ids, strict=True)],
        }

    def training_in_a_mixed_batch(self, ids: Tensor) -> dict[str, Any]:
        mine = [_trained(a) for a in self.adapters[: len(ids)]]
        stacked, index = _trained(pf.stack(mine)), list(range(len(ids)))

        def together() -> list[Tensor]:
            logits = self.net.mixed(stacked, index, ids[:, 0], use_cache=False).logits
            return _gradient(logits.float().square().mean((1, 2)).sum(), stacked)

        return self.training(ids) | {OURS: together}

    def serving(self, ids: Tensor) -> dict[str, Any]:
        mine, rows = self.adapters[: len(ids)], ids[:, 0]
        stacked, index = pf.stack(mine), list(range(len(ids)))

        def apart() -> list[Tensor]:
            return [self.net.apply(a, x, use_cache=False).logits for a, x in zip(mine, ids, strict=True)]

        return {OURS: quiet(lambda: self.net.mixed(stacked, index, rows, use_cache=False).logits), APART: quiet(apart)}


def _trained(adapter: pf.Adapter) -> pf.Adapter:
    return {n: {k: t.detach().clone().requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}


def _gradient(loss: Tensor, adapter: pf.Adapter) -> list[Tensor]:
    return list(torch.autograd.grad(loss, pf.leaves(adapter)))


def run(options: Options) -> list[Json]:
    torch.manual_seed(5)
    tenants, rows = Tenants(), []
    small = options.repeats < REPEATS
    for kind in KINDS:
        for tokens in TOKENS:
            for k in TENANTS:
                if k * tokens > (256 if small else MOST):
                    continue
                ids = torch.randint(0, 1000, (k, 1, tokens))
                ways = getattr(tenants, kind.replace(" ", "_"))(ids)
                mine, theirs = ways[OURS](), ways[APART]()
                agree(
                    mine,
                    torch.cat(theirs) if kind == "serving" else list(map(torch.stack, zip(*theirs, strict=True))),
                    kind,
                )
                repeats = options.repeats if k * tokens <= 256 else min(options.repeats, 11 if k * tokens < 2048 else 5)
                times = options.compare(ways, repeats=repeats, warmup=1)
                rows.append(row(f"{kind}, {k} tenants × {tokens} tokens, {WHERE}", times))
    return rows


# The page.


def curve(record: Json) -> dict[tuple[str, int, int], Json]:
    """(kind, tenants, tokens) → ratio"""
    out = {}
    for line in record["rows"]:
        kind, _, rest = line["case"].partition(", ")
        words = rest.split()
        out[kind, int(words[0]), int(words[3])] = line["ratio_to"][APART]
    return out


def page(record: Json) -> str:
    """What docs/many.md says of it."""
    found, parts = curve(record), []
    e = record["environment"]
    many = sorted({k for _, k, _ in found})
    for kind, what in KINDS.items():
        parts += [f"**{kind.capitalize()}**: {what}, over a pass for each.", ""]
        parts.append("| tokens of each | " + " | ".join(f"{k} tenants" for k in many) + " |")
        parts.append("|" + " --- |" * (len(many) + 1))
        for tokens in sorted({t for _, _, t in found}):
            cells = [_cell(found.get((kind, k, tokens))) for k in many]
            parts.append(f"| {tokens} | " + " | ".join(cells) + " |")
        parts += ["", _verdict(kind, found), ""]
    words = (
        f"Measured by `python -m benchmarks tenants` ({WHERE}; {e['date']}, torch {e['torch']}, {e['machine']} with "
        f"{e['cpu_capability']}, {e['threads']} thread, load average {e['load_average']} at the end): median and "
        "quartiles of paired ratios, the two ways taking turns, because the machine had other work. Below 1, one pass "
        f"is faster. Empty: more than {MOST} tokens in a pass, not measured. Other sizes were not measured."
    )
    parts = [part if part.startswith("|") else _wrapped(part) for part in parts]
    picture = "![What one pass for all tenants takes of a pass for each](tenants.png)"
    return "\n".join([_wrapped(words), "", *parts, picture])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _cell(ratio: Json | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def _verdict(kind: str, found: dict[tuple[str, int, int], Json]) -> str:
    """Where it pays by the figures: where the upper quartile is below 1."""
    mine = {(k, t): r for (what, k, t), r in found.items() if what == kind}
    pays = {t for t in {t for _, t in mine} if all(r["q3"] < 1 for (_, u), r in mine.items() if u == t)}
    never = sorted({t for _, t in mine} - pays)
    up_to = [t for t in sorted(pays) if not never or t < never[0]]
    if not up_to:
        return "At each of these lengths, there is a number of tenants for which it does not pay."
    if not never:
        return f"It pays at every length measured, up to {up_to[-1]} tokens of each tenant."
    least = min(t for _, t in mine)
    best = min(r["median"] for (_, t), r in mine.items() if t == least)
    return (
        f"It pays up to {up_to[-1]} tokens of each tenant, for every number of tenants measured, and most where there "
        f"are few tokens ({best:.2f} at {least}). From {never[0]} on, a pass has arithmetic enough of its own."
    )


def write_page(record: Json, path: Path = PAGE) -> None:
    """Put the figures between the page's marks."""
    head, mark, rest = path.read_text().partition("<!-- tenants -->")
    _, end, tail = rest.partition("<!-- /tenants -->")
    path.write_text(f"{head}{mark}\n\n{page(record)}\n\n{end}{tail}")


def plot(record: Json, path: Path = PLOT) -> None:
    """The ratio against the tokens of each tenant, a curve for each number of tenants."""
    from matplotlib.figure import Figure

    found = curve(record)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 3, sharey=True), KINDS, strict=True):
        for k, colour in zip(sorted({k for _, k, _ in found}), ("#0072b2", "#d55e00", "#009e73"), strict=True):
            points = sorted((t, r) for (what, n, t), r in found.items() if (what, n) == (kind, k))
            x, y = [t for t, _ in points], [r["median"] for _, r in points]
            low, high = [r["q1"] for _, r in points], [r["q3"] for _, r in points]
            axis.plot(x, y, "o-", color=colour, label=f"{k} tenants")
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.axhline(1, color="#4d4d4d", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(kind, loc="left", fontsize=10)
        axis.set(xlabel="tokens of each tenant", ylim=(0, 1.6))
        axis.legend(frameon=False)
    figure.supylabel("one pass / a pass for each", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    from benchmarks import table

    record = next(r for r in table.read() if r["name"] == "tenants")
    write_page(record)
    plot(record)


if __name__ == "__main__":
    main()
