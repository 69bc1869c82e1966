"""docs/benchmarks.md from benchmarks/results/*.json. The words stand here; every figure comes from the results."""

import json
from pathlib import Path

from benchmarks.harness import RESULTS, Json

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

Made by `python -m benchmarks` (`make bench`) from `benchmarks/results/*.json`; do not edit. `python -m benchmarks
llama --quick` runs one of them in brief and writes nothing.

Every figure is a **ratio of times**, ours to another way's, as median (lower quartile–upper quartile) of paired ratios:
below 1 we are faster. The ways take turns in one process, so that both sides of a ratio saw the same machine; threads
and malloc's thresholds are fixed. Times themselves are in the JSON files; on a shared CPU they mean little.
All sides run the same job: same values, dtype, shapes and threads; outputs and gradients are compared with PEFT's
before anything is timed. PEFT runs in train mode without dropout; LoRA and DoRA have rank 16 at every projection.

"target" is what this project set out to reach, "floor" what an adapter that cost nothing would reach (the bare base's
time over that of the way the target is set against), as far as that base can be timed alone. Each section says when,
and with how many threads, it was run.
"""

SECTIONS = {
    "adapt": (
        "Making an adapted model",
        "`adapt` + `init` against PEFT's `get_peft_model`. Each run gets a fresh model, made outside the time, because "
        "PEFT changes it. Ours copies the model's structure, which calls run on, at the first call: that is not in it.",
    ),
    "around": (
        "Methods at modules and on inputs",
        "Bottleneck adapters against the same code in forward hooks of torch on a live module, which any thread may "
        "change; then a mixed batch against a loop over its adapters, and `vmap` over prompts against calls one by "
        "one.",
    ),
    "llama": (
        "A whole model",
        "Random Llamas in fp32. A training step is forward, backward and dropping the gradients, without an optimizer; "
        "the base's share of it is its forward pass and the gradient with respect to its input. Forward passes run "
        "without gradients. With one row and one token a call is mostly overhead: LoRA's three small products, and the "
        "dispatch from `F.linear` to them.",
    ),
    "load": (
        "Loading a checkpoint",
        "`pf.load` of a LoRA that PEFT wrote, against PEFT's `load_adapter` of the same file, with the others there "
        "already. Ours reads the file and binds it to the model anew each time; PEFT adds layers to its model.",
    ),
    "memory": (
        "Memory of gradients",
        '`net.checkpointed("layers")` against the same net without: its layers keep their inputs alone, and run again '
        "in the backward pass, also under `grad` and `vmap(grad)`. Peak memory is that of the tensors which the "
        "gradient makes, counted operation by operation.",
    ),
    "merging": (
        "Merging adapters",
        "Each function of `pf.merging` against `linear` of the same adapters, which is exact and makes no matrix of "
        "the weight's size, and against PEFT's `add_weighted_adapter` where it does the same; results are compared.",
    ),
    "methods": (
        "Every method",
        "Each method on the same small Llama (3 layers, d 256, 2×32 tokens, fp32) against PEFT's same method at the "
        "same hyper-parameters, loaded from PEFT's own checkpoint; what PEFT does not have, against the base alone. "
        "docs/methods.md has the same figures by method, with memory and trained numbers.",
    ),
    "mixed": (
        "Every row with its own adapter",
        "`bank.apply` against PEFT's `adapter_names` and the bare base, forward without gradients, in eval mode. "
        "distinct: as many rows as adapters; otherwise twice as many, spread evenly, half of them on one adapter, or "
        "all on one. Loading writes an adapter into a bank's slot; PEFT's `add_adapter` is its second, its cheapest.",
    ),
    "module": (
        "The nn.Module view",
        "A training step of `as_module` (forward, backward and dropping the gradients, no optimizer) against the same "
        "through `net.apply`, and PEFT's; then what making it takes.",
    ),
    "routed": (
        "Mixed batches through experts",
        "Eight rows, four adapters and the base for two rows, at all experts, the router and two projections of a "
        "small Mixtral, forward without gradients, against a loop over the adapters (one call for the rows of each) "
        "and the bare base; then what PEFT runs of it, the attention alone. Then what it costs to follow the rows "
        "through a whole model, and to follow a function of torch inside a routed module, against the same forward "
        "outside of one, where nothing is followed.",
    ),
    "shared": (
        "One product with A for layers that share an input",
        "Three layers of one width with the same input, each with a product with its own A, as the library does, "
        "against the three as one function by hand: the A side by side, one product, and in the backward pass dx at "
        "once. It is the most that sharing could bring ([why it is left out](kernels.md#left-out)).",
    ),
    "routing": (
        "Routing",
        "`net.gated` with a router against the same call with gates that are given, and the bare base; forward without "
        "gradients, in eval mode.",
    ),
    "starts": (
        "Starting points, layers and ranks",
        "`pf.starts` and `pf.suggest` against what they are made of: the forward passes over the same batches, or the "
        "gradients of the one weight, and one singular value decomposition of it.",
    ),
    "steps": (
        "Optimizer steps",
        "A step of each optimizer of `pf.steps`, applied, against `steps.adamw`, and against `torch.optim.AdamW` on "
        "the same tensors.",
    ),
    "tenants": (
        "Tokens of each tenant, and number of tenants",
        "The gradient of every tenant in one pass (training: by `vmap` over a stack, or `net.mixed`), or the forward "
        "pass (serving: `net.mixed`), against a pass for each by plain autograd. [Many "
        "adapters](many.md#where-batching-stops-to-pay) has the curve.",
    ),
    "tools": (
        "Tools",
        "Against folding the adapter in (`net.merge`), and against a forward pass of the base.",
    ),
    "vmap": (
        "Many adapters in one pass",
        "`vmap(net.apply)` over a stack of adapters against a loop over them; all of it is ours. One pass saves the "
        "fixed cost of a call, so the fewer tokens there are, the more it saves.",
    ),
}


def cell(ratio: Json | None) -> str:
    if ratio is None:
        return ""
    digits = 3 if ratio["median"] < 0.1 else 2
    return f"{ratio['median']:.{digits}f} ({ratio['q1']:.{digits}f}–{ratio['q3']:.{digits}f})"


def goal(row: Json) -> list[str]:
    """The cells of target, floor and "met"."""
    target = row.get("target")
    if target is None:
        return ["", "", ""]
    stretch = f" (stretch {target['stretch']:g})" if target["stretch"] is not None else ""
    floor = f"{row['floor']['median']:.2f}" if "floor" in row else ""
    return [f"≤ {target['at_most']:.3g} of {target['against']}{stretch}", floor, f"**{target['met']}**"]


def table(rows: list[Json]) -> list[str]:
    """The rows as Markdown, a column for every way that ours is compared with; notes below."""
    ways = list(dict.fromkeys(way for row in rows for way in row["ratio_to"]))
    lines = [["", *(f"to {way}" for way in ways), "target", "floor", "met"]]
    lines.append(["---"] * len(lines[0]))
    notes: list[str] = []
    for row in rows:
        mark = ""
        if row.get("note"):
            if row["note"] not in notes:
                notes.append(row["note"])
            mark = f" [{notes.index(row['note']) + 1}]"
        lines.append([row["case"] + mark, *(cell(row["ratio_to"].get(way)) for way in ways), *goal(row)])
    below = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [text for note in below for text in ("", note)]


def conditions(record: Json) -> str:
    e = record["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("peftfn", "torch", "peft", "transformers"))
    threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}" + ("" if e["clock"] == "wall" else ", CPU time")
    repeats = "/".join(str(n) for n in sorted({row["repeats"] for row in record["rows"]}))
    return (
        f"{e['date']}, Python {e['python']}, {versions}, {e['machine']} with {e['cpu_capability']}, "
        f"{threads} of {e['cpu_count']} CPUs, load average {e['load_average']} at the end, {repeats} repetitions."
    )


def render(records: list[Json]) -> str:
    known = list(SECTIONS)
    order = sorted(records, key=lambda r: (known.index(r["name"]) if r["name"] in known else len(known), r["name"]))
    parts = [HEAD]
    for record in order:
        title, words = SECTIONS.get(record["name"], (record["name"], ""))
        lines = [f"## {title}", "", *([words, ""] if words else []), *table(record["rows"]), "", conditions(record), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def read(folder: Path = RESULTS) -> list[Json]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def write(folder: Path = RESULTS, path: Path = DOCS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(read(folder)))
    return path


if __name__ == "__main__":
    print(write().name)
