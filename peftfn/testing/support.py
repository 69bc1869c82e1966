"""docs/methods.md, made by running: what every method means, costs, and supports at every kind of site.

python -m peftfn.testing.support > docs/methods.md
"""

import inspect
import json
import re
import statistics
import sys
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftfn as pf
from peftfn.core.method import Method, Weight, registry
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.testing.case import Case
from peftfn.testing.fields import field_table, rate_table
from peftfn.testing.laws import routes
from peftfn.testing.models import AROUND, MODELS, OUT
from peftfn.testing.routes import ROUTES

INTRO = """# Methods

Made by running `python -m peftfn.testing.support`; do not edit. A test compares this page with a new run.

**Which one?** `LoRA` is the default, and what other tools read. `DoRA` adds a magnitude for each row: often better at
small ranks, for the price of a norm a step. `IA3` and `RoAd` train a vector or two a layer: thousands of adapters fit
in memory. `VeRA`, `VBLoRA`, `UniLoRA` and `TinyLoRA` share most of what they use between layers: the smallest files.
`OFT` and `HRA` rotate, which keeps the weight's spectrum; `BOFT` rotates and scales rows. `Full` trains norms, biases
and heads whole. `chain` puts several methods at one site.
"""
MODULES = """\
## Methods around a module

Their sites are modules, and a rule's pattern is matched against the end of a module's name: "mlp" finds
`layers.0.mlp`. They merge into no weight. `LISA` needs no method of its own: give the layers `Full` rules, and let a
training loop that uses `as_module` switch the `requires_grad` of their parameters every few steps.
"""
"""What comes before the tables of methods around a module."""
RATES = """\
## Learning rates

What papers and PEFT's documentation advise, with AdamW unless they say otherwise. A rate for one model and batch size
is a place to start for another. `LoRA`'s is a start for its variants too; methods that train few numbers
(vectors, circulants) want larger ones, as the table shows.
"""
"""What comes before the table of learning rates."""
REASONS = """\
The aim was none slower, and a median of 0.7. For most methods the base's own products are most of the time (the second
figure is near 1), so 0.7 of PEFT's time would be less than the base's. What is above 1, and why, by counting
operations:

* FRoD takes four dense products a site: by W, V, diag(d) + S and U. PEFT rebuilds W from its factors, so that W's own
  is left out, and multiplies by S as a sparse matrix, which torch.func's transforms do not take. Here W is read at each
  call, since its owner may change it.
* PiSSA and OLoRA leave the base's weight as it is, where PEFT replaces it. So they run at twice the rank, and take two
  differences and two concatenations a site and call, about 6 µs; prepared, they do not.
* Full, on norms, adds to W at each call, where PEFT trains a copy of it.
* BEFT, IA3, KaSA, Lily, MiSS, PVeRA, SuperTuning, TrainableTokens, UniLoRA, VeLoRA and VeRA run no more operations
  than PEFT's, but for a dozen small ones (of 240 to 1500). What is left is the fixed cost of a call, which all methods
  have: about 0.1 ms to see what the base's owner changed and to fill the slots, and 5 µs a site to reach its method,
  together 2 % of this small model's forward pass.
"""
"""Why some methods are slower than PEFT's: what the figures of `MEASURED` cannot say."""
SIZE = 1024
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "methods.json"
"""What `python -m benchmarks methods` found; not part of an installed package."""


def methods() -> list[type[Weight]]:
    """The library's methods, by name."""
    return [
        c for _, c in sorted(registry.items()) if issubclass(c, Weight) and c.__module__.startswith("peftfn.methods")
    ]


def around() -> list[type[ModuleMethod]]:
    """The library's methods around a module, by name."""
    return [
        c for _, c in sorted(registry.items()) if issubclass(c, ModuleMethod) and c.__module__.startswith("peftfn.m")
    ]


def on_inputs() -> list[type[Method]]:
    """The library's methods on inputs, by name."""
    ours = (c for _, c in sorted(registry.items()) if c.__module__.startswith("peftfn.m"))
    return [c for c in ours if issubclass(c, Along | Tokens | Prefix)]


def meaning(cls: type[Method]) -> tuple[str, str]:
    """(formula, paper) from the docstrings: the first line of the class, and its first arXiv number."""
    doc = inspect.getdoc(cls) or ""
    formula = doc.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", doc)
    return formula, f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""


def size(cls: type[Weight]) -> str:
    """Trainable parameters with default hyper-parameters at one linear layer of SIZE², and in its bank."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(SIZE, SIZE))
    try:
        plan = pf.adapt(model, {"0.weight": cls()}).plan
    except (ValueError, TypeError) as e:
        return f"needs arguments ({type(e).__name__})"
    own = sum(prod(shape) for shape in plan["0.weight"].spec.values())
    bank = sum(prod(shape) for b in plan.banks.values() for shape in b.values())
    return f"{own:,}" + (f" + {bank:,} shared" if bank else "")


def use(cls: type[Method]) -> tuple[str, str]:
    """(trainable parameters per site, when to use the method) from the docstring."""
    doc = " ".join((inspect.getdoc(cls) or "").split())
    found = re.search(r"Trainable parameters per site: (.+?)\. Use it (.+?)\.(?: |$)", doc)
    if found is None:
        raise ValueError(f'{cls.__name__}: its docstring has no "Trainable parameters per site: …. Use it …."')
    return found[1], found[2]


def times(path: Path = MEASURED) -> list[str]:
    """The measured table: ratios to PEFT's same method, and to the bare base."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    lines: dict[tuple[str, str], Any] = {}
    for row in record["rows"]:
        lines[row["method"], row["case"].partition(", ")[2]] = row

    def ratio(name: str, case: str) -> str:
        ratios = lines.get((name, case), {}).get("ratio_to", {})
        return " / ".join(f"{ratios[way]['median']:.2f}" if way in ratios else "–" for way in ("PEFT", "base"))

    cases = ("training step", "forward", "forward, prepared")
    rows = ["", "## What they take", ""]
    rows += [
        "Time and memory on one small Llama, from `benchmarks/results/methods.json` (`python -m benchmarks methods`):"
    ]
    rows += [
        "ours / PEFT's same method, then ours / the bare base, each the median of paired ratios; – where PEFT does not"
    ]
    rows += [
        'have the method. "prepared": after `net.prepare`. Memory: the most that a training step allocates, in MiB.'
    ]
    rows += [""]
    for case in cases[:2]:
        all_ = [
            row["ratio_to"]["PEFT"]["median"]
            for (_, c), row in lines.items()
            if c == case and "PEFT" in row["ratio_to"]
        ]
        slower = sum(r > 1 for r in all_)
        rows += [
            f"* {case}: median {statistics.median(all_):.2f} of PEFT's time over {len(all_)} methods; {slower} slower."
        ]
    rows += ["", *REASONS.splitlines()]
    rows += ["", f"| method | trained | {' | '.join(cases)} | memory: ours, PEFT, base |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in lines):
        first = lines[name, cases[0]]
        memory = ", ".join(
            f"{first['peak_mib'][way]:.1f}" if way in first["peak_mib"] else "–" for way in ("peftfn", "PEFT", "base")
        )
        rows += [f"| `{name}` | {first['trained']:,} | {' | '.join(ratio(name, c) for c in cases)} | {memory} |"]
    return rows


def cell(method: Weight, model: str) -> str:
    """What works at one kind of site, found by trying: "·" not accepted, else letters.

    a: apply equals merge, or, where there is nothing to merge, applies; m: merge; x: mixed batch; l: to_lora.
    """
    try:
        case = Case(method, model)
        case.net.apply(case.adapter(), case.x)
    except ValueError:
        return "·"
    routes(case, ["apply", "merge", "mixed"])
    out = "a" + "".join(letter for letter, way in (("m", "merge"), ("x", "mixed")) if ROUTES[way].where(case))
    try:
        net, a = pf.to_lora(case.net, case.adapter(), rank=OUT)
    except ValueError:
        return out
    same = torch.allclose(net.apply(a, case.x), case.net.apply(case.adapter(), case.x), atol=1e-4)
    return out + ("l" if same else "")


def letters(cls: type[ModuleMethod], model: str) -> str:
    """As `cell`, around a module: with the first test case that the module's kind does not refuse."""
    for case in (Case(cls(**fields), model) for fields in cls.cases):
        try:
            case.net.apply(case.adapter(), case.x)
        except ValueError:
            continue
        if not case.net.plan[case.site].spec:
            return "a"  # nothing to train, and so nothing to mix
        ways = [w for w in ("apply", "mixed", "gated by row") if ROUTES[w].where(case)]
        routes(case, ways)
        return "".join(w[0].replace("m", "x") for w in ways) + "s" * case.method.combines
    return "·"


def page() -> str:
    rows = ["## What they mean", "", "| method | meaning | paper |", "|---|---|---|"]
    rows += [f"| `{c.__name__}` | {' | '.join(meaning(c))} |" for c in methods()]
    rows += ["", "## What they train, and when to use them", ""]
    rows += [f"| method | trainable parameters per site | {SIZE}×{SIZE}, defaults | use it |", "|---|---|---|---|"]
    rows += [f"| `{c.__name__}` | {use(c)[0]} | {size(c)} | {use(c)[1]} |" for c in methods()]
    rows += [*times(), "", "## Where they work", ""]
    rows += ["a: applies. m: merges. x: in a mixed batch. l: converts to LoRA. ·: refused with an error."]
    rows += ["Every letter was earned by running it against its definition, once a method with its first test case."]
    rows += ["", f"| method | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    for cls in methods():
        method = cls(**cls.cases[0])
        rows += [f"| `{cls.__name__}` | {' | '.join(cell(method, name) for name in MODELS)} |"]
    rows += ["", *MODULES.splitlines(), "", "| method | meaning | paper |", "|---|---|---|"]
    rows += [f"| `{c.__name__}` | {' | '.join(meaning(c))} |" for c in around()]
    rows += ["", "| method | trainable parameters per site | use it |", "|---|---|---|"]
    rows += [f"| `{c.__name__}` | {' | '.join(use(c))} |" for c in around()]
    rows += ["", "a: applies. x: in a mixed batch. g: in a gated one. s: scales and adds. ·: refused with an error."]
    rows += ["", f"| method | {' | '.join(AROUND)} |", "|---" * (len(AROUND) + 1) + "|"]
    for c in around():
        rows += [f"| `{c.__name__}` | {' | '.join(letters(c, name) for name in AROUND)} |"]
    rows += ["", "## Methods on inputs", ""]
    rows += ["A rule for one of them names a backbone: [prompts, prefixes and adapters around modules](prompts.md)."]
    rows += ["", "| method | meaning | paper |", "|---|---|---|"]
    rows += [f"| `{c.__name__}` | {' | '.join(meaning(c))} |" for c in on_inputs()]
    rows += ["", "| method | trainable parameters per site | use it |", "|---|---|---|"]
    rows += [f"| `{c.__name__}` | {' | '.join(use(c))} |" for c in on_inputs()]
    rows += ["", *RATES.splitlines(), "", *rate_table()]
    rows += ["", "## Fields", "", "Every hyper-parameter of every method, in the order of its arguments.", ""]
    rows += field_table([*methods(), *around(), *on_inputs()])
    return INTRO + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
