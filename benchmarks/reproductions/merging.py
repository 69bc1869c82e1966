"""Merging in Core Space and in the weights' own, and whether an adapter merged alone is itself."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from benchmarks.reproductions.claim import NO, YES, Claim, Json, table, task
from peftfn.compare.methods import Recipe
from peftfn.compare.tasks import Ready, cross_entropy

TURNS = [(k, flip) for flip in (False, True) for k in range(4)]
"""Quarters, and whether mirrored: eight tasks, the first of which the base knows."""


def turned(x: Tensor, k: int, flip: bool) -> Tensor:
    return (x.flip(2) if flip else x).rot90(k, (1, 2))


def run(quick: bool, folder: Path) -> Json:
    return {"core": core(10 if quick else 150, 3 if quick else 8), "identity": identity()}


def core(steps: int, tasks: int) -> Json:
    """Adapters of several tasks, trained in one `vmap` and merged in two spaces."""
    ready = task("digits")
    upright = turned(ready.inputs[0], 3, False)  # the task's own images have one turn
    net = pf.adapt(ready.model, Recipe(pf.LoRA(rank=4)).rules(ready.layers))
    adapters = trained(net, ready, upright, steps, tasks)
    right = partial(accuracies, net, ready, upright)
    out: Json = {"tasks": tasks, "base": right([net.init()] * tasks), "alone": right(adapters), "merged": {}}
    pairs, rank = [(net, a) for a in adapters], 4 * tasks
    exact_net, exact = pf.merging.linear(pairs, [1 / tasks] * tasks)
    for space in ("dense", "core"):
        more = {"rank": rank} if space == "dense" else {}
        for name, merge in rules(tasks).items():
            start = perf_counter()
            merged_net, merged = merge(pairs, space=space, **more)
            seconds = perf_counter() - start
            got = accuracies(merged_net, ready, upright, [merged] * tasks)
            out["merged"][f"{name}, {space}"] = {"seconds": seconds, "right": got}
            if name == "mean":
                out["merged"][f"{name}, {space}"]["error"] = apart(exact_net, exact, merged_net, merged)
    return out


def rules(tasks: int) -> dict[str, Any]:
    """Rules for entries. Everything kept, with equal weights: the mean of the changes, which is linear."""
    weights = [1 / tasks] * tasks
    return {
        "mean": partial(pf.merging.magnitude, weights=weights, density=1.0),
        "TIES": partial(pf.merging.ties, weights=[1.0] * tasks, density=0.3),
    }


def trained(net: pf.Adapted, ready: Ready, upright: Tensor, steps: int, tasks: int) -> list[pf.Adapter]:
    """An adapter for each of the first tasks."""
    images = torch.stack([turned(upright, *t) for t in TURNS[:tasks]])  # [tasks, n, 8, 8]

    def data(config: Any, step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(step)
        index = ready.train[torch.randint(len(ready.train), (32,), generator=g)]
        return images[config["task"], index], ready.label[index]

    done = pf.sweep(
        [{"task": i, "seed": i} for i in range(tasks)],
        net,
        lambda net, a, batch: cross_entropy(net.apply(a, batch[0]), batch[1]),
        data,
        lambda c: pf.steps.chain(pf.steps.adamw(1e-2), pf.steps.scheduled(pf.steps.cosine(steps, warmup=3))),
        steps=steps,
        every=steps,
        slots=tasks,
    )
    return [done.adapter(t) for t in done.trials]


@torch.no_grad()
def accuracies(net: pf.Adapted, ready: Ready, upright: Tensor, adapters: list[pf.Adapter]) -> list[float]:
    """Of each adapter on its task."""
    out = []
    for a, turn in zip(adapters, TURNS, strict=False):
        x, label = turned(upright[ready.test], *turn), ready.label[ready.test]
        out.append(float((net.apply(a, x).argmax(-1) == label).float().mean()))
    return out


def apart(one_net: pf.Adapted, one: pf.Adapter, net: pf.Adapted, a: pf.Adapter) -> float:
    """The largest relative distance of two changes of a weight."""
    left, right = one_net.delta(one), net.delta(a)
    return max(float((left[n] - right[n]).norm() / left[n].norm()) for n in left)


def identity() -> Json:
    """PEFT's and our sum of one adapter with the weight 1: how far its effect on the output is from the adapter's."""
    return {kind: {"PEFT": theirs(options), "peftfn": ours(options)} for kind, options in KINDS.items()}


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA with a bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}


def theirs(options: dict[str, Any]) -> float:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(64, 32)
    plain = base(x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False, **options)
    model = get_peft_model(base, config, adapter_name="one")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name or "lora_B.one.bias" in name:
                p += 0.3 * p.abs().mean().clamp(min=0.3) * torch.randn_like(p)
        alone = model(x)
        model.add_weighted_adapter(["one"], [1.0], "merged")
        model.set_adapter("merged")
        return float((model(x) - alone).norm() / (alone - plain).norm())


def ours(options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
    x, g = torch.randn(64, 32), torch.Generator().manual_seed(1)
    names = {"use_rslora": "rslora", "lora_bias": "lora_bias"}
    kind = pf.DoRA if options.get("use_dora") else pf.LoRA
    given = {names[k]: v for k, v in options.items() if k in names}
    net = pf.adapt(base, {"weight": kind(rank=4, alpha=8, **given)})
    a = {
        n: {k: t + 0.3 * torch.randn(t.shape, generator=g) for k, t in leaf.items()}
        for n, leaf in net.init(seed=0).items()
    }
    merged_net, merged = pf.merging.linear([(net, a)], [1.0])
    alone = net.apply(a, x)
    return float((merged_net.apply(merged, x) - alone).norm() / (alone - base(x)).norm())


def found(figures: Json) -> tuple[dict[str, str], str]:
    c, error = figures["core"], {s: figures["core"]["merged"][f"mean, {s}"]["error"] for s in ("dense", "core")}
    rows = [["the base", _mean(c["base"]), "", ""], ["each task's own adapter", _mean(c["alone"]), "", ""]]
    for name, m in c["merged"].items():
        rows.append([name, _mean(m["right"]), f"{m['seconds']:.3f}", f"{m['error']:.1e}" if "error" in m else ""])
    speed = c["merged"]["TIES, dense"]["seconds"] / c["merged"]["TIES, core"]["seconds"]
    better = sum(c["merged"]["TIES, core"]["right"]) >= sum(c["merged"]["TIES, dense"]["right"])
    verdicts = {
        "a linear merge in Core Space is the merge of the weights (1e-4)": YES if error["core"] <= 1e-4 else NO,
        f"it is faster (TIES: {speed:.1f} times)": YES if speed > 1 else NO,
        "TIES is at least as accurate in Core Space": YES if better else NO,
        "PEFT's sum of one rsLoRA or DoRA with the weight 1 is another adapter (0.01)": YES
        if all(figures["identity"][k]["PEFT"] > 0.01 for k in ("rsLoRA", "DoRA"))
        else NO,
        "peftfn's is the adapter (1e-4)": YES if all(v["peftfn"] < 1e-4 for v in figures["identity"].values()) else NO,
    }
    ids = [[kind, f"{v['PEFT']:.2g}", f"{v['peftfn']:.2g}"] for kind, v in figures["identity"].items()]
    text = table([f"{c['tasks']} tasks", "mean accuracy, %", "s", "relative error of the change"], rows)
    return verdicts, text + "\n" + table(
        ["one adapter, weight 1: relative change of its effect", "PEFT", "peftfn"], ids
    )


def _mean(shares: Sequence[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}"


CLAIM = Claim(
    "Merging in Core Space, and merging one",
    "Panariello et al., Core Space, 2025, [arXiv:2509.17786](https://arxiv.org/abs/2509.17786), and "
    "[huggingface/peft#3761](https://github.com/huggingface/peft/issues/3761)",
    "Core Space loses nothing of low-rank changes, so linear merges in it are those of the weights; it is up to 600 "
    "times as fast, and other rules merge better there. And: PEFT's `add_weighted_adapter` of one adapter with the "
    "weight 1 is not that adapter, for rsLoRA, DoRA and biases.",
    "Eight tasks: digits turned by quarters, and mirrored; a LoRA of rank 4 for each, trained in one `vmap`, 150 "
    "steps; merged densely (then a decomposition to rank 32) and in Core Space. Matrices of 48 to 192 are far too "
    "small for the paper's speeds. The second claim is measured on the PEFT that is installed, at two layers.",
    "All tolerances are ours. The rules and the record came in one change, so that nothing shows which was first.",
    run,
    found,
)
