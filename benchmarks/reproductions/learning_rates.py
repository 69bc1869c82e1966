"""Variants of LoRA, each at its own best learning rate, and the curvature where they start."""

import statistics
from pathlib import Path

from benchmarks.reproductions.claim import NO, PARTLY, YES, Claim, Json, monotone, table, task, wrapped
from peftfn.compare.methods import METHODS
from peftfn.compare.run import Settings, best, mean_test, one, read

FOLDER = Path(__file__).parents[1] / "comparison"
VARIANTS = ("LoRA", "DoRA", "PiSSA", "OLoRA")
TASKS = ("characters", "digits")


def run(quick: bool, folder: Path) -> Json:
    """All methods that the comparison has records of; `peftfn compare --out benchmarks/comparison` makes them."""
    if quick:
        how = Settings(rates=(1e-3, 1e-2), seeds=1, steps=2)
        return {"digits": {n: brief(one(task("digits"), n, METHODS[n], how)) for n in ("LoRA", "PiSSA")}}
    records = [r for r in read(FOLDER) if r["task"] in TASKS]
    missing = [f"{t}.{n}" for t in TASKS for n in VARIANTS if (t, n) not in {(r["task"], r["method"]) for r in records}]
    if missing:
        raise SystemExit(f"no record of {', '.join(missing)}: run peftfn compare --out {FOLDER.name} before")
    return {t: {r["method"]: brief(r) for r in records if r["task"] == t} for t in TASKS}


def brief(record: Json) -> Json:
    """What a page needs of a record of `peftfn compare`, or of the part of one."""
    of: dict[float, list[float]] = {}
    for t in record["trials"]:
        of.setdefault(t["lr"], []).append(t.get("test", 0.0) if t["status"] == "done" else 0.0)
    found = best(record)
    return {
        "trained": record["trained"],
        "sharpness": record.get("sharpness"),
        "best": None if found is None else found[0],
        "test": mean_test(record),
        "spread": statistics.stdev(t["test"] for t in found[1]) if found and len(found[1]) > 1 else 0.0,
        "rates": {f"{lr:g}": statistics.mean(values) for lr, values in of.items()},
    }


def found(figures: Json) -> tuple[dict[str, str], str]:
    rows, words, verdicts = [], [], dict[str, str]()
    for name, of in figures.items():
        variants = {n: r for n, r in of.items() if n in VARIANTS}
        lora = f"{of['LoRA']['best']:g}"
        at_one, tuned = (
            100 * (max(v) - min(v))
            for v in ([r["rates"][lora] for r in variants.values()], [r["test"] for r in variants.values()])
        )
        for method, r in variants.items():
            cells = [f"{100 * r['rates'][lora]:.1f}", f"{100 * r['test']:.1f} ± {100 * r['spread']:.1f}"]
            rows.append([f"{name}: {method}", *cells, f"{r['best']:.3g}", f"{r['sharpness']:.3g}"])
        verdicts[f"{name}: within 2 points once each rate is tuned (here {tuned:.1f})"] = YES if tuned <= 2 else NO
        verdicts[f"{name}: tuning makes the gap smaller"] = YES if tuned < at_one else NO
        a, b = of["LoRA"], of["PiSSA"]
        smaller, sharper = b["best"] < a["best"], b["sharpness"] > a["sharpness"]
        verdicts[f"{name}: PiSSA wants a smaller rate than LoRA, and its λ_max is larger"] = (
            YES if smaller and sharper else PARTLY if smaller or sharper else NO
        )
        whole = [r for r in of.values() if r["best"] is not None]
        both = monotone([r["best"] for r in whole], [-r["sharpness"] for r in whole])
        verdicts[f"{name}: over all {len(whole)} methods, best rates rank as 1/λ_max do (0.5 or more)"] = (
            YES if both >= 0.5 else PARTLY if both > 0 else NO
        )
        words.append(
            f"{name}: the gap is {at_one:.1f} points at LoRA's best rate, and {tuned:.1f} at each one's own; over "
            f"{len(whole)} methods of all kinds, the rank correlation of the best rate with 1/λ_max is {both:g}."
        )
    head = ["", "test accuracy at LoRA's best rate, %", "at its own, %", "best rate", "λ_max at the start"]
    return verdicts, table(head, rows) + "\n" + "\n".join(map(wrapped, words))


CLAIM = Claim(
    "Learning rates matter",
    "Lee et al., 2026, [arXiv:2602.04998](https://arxiv.org/abs/2602.04998)",
    "Once learning rates are tuned, variants of LoRA reach similar peaks, within 1–2 %. Their best rates differ, which "
    "goes with the largest eigenvalue of the Hessian: PiSSA wants a smaller rate than LoRA, and has a larger λ_max.",
    "The records of the [comparison](comparison.md) on two tasks, turned digits and code after prose: rank 4, eight "
    "rates two to a decade, three seeds, 60 steps of AdamW; all rates and seeds of a method in one `vmap`. λ_max by "
    "Lanczos' method on 32 examples. The paper fine-tunes language models of billions of parameters to convergence; "
    "these are two layers and a short budget, in which methods that start fast have an advantage.",
    "Two points are the paper's. That a rank correlation of 0.5 is agreement is ours: the paper has no number for it. "
    "Some records of the comparison were there when the rules were written.",
    run,
    found,
)
