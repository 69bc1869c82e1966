"""The commands that train: demo and compare."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from peftfn.cli.arguments import Command, names, positive, rates


def add_demo(command: Command) -> None:
    new = command(
        "demo",
        _demo,
        "train several adapters on real texts, and check what must hold",
        "Trains several methods and seeds on a frozen sentence encoder, on two real tasks; prints a table, "
        "writes a plot and the adapters. Needs no network and no GPU.",
    )
    new.set_defaults(expected=(OSError,))  # its only input is a folder
    new.add_argument("--out", type=Path, default="demo_out", metavar="DIR", help="output folder (%(default)s)")
    new.add_argument("--seeds", type=positive, metavar="N", help="adapters a method, trained at once")
    new.add_argument("--steps", type=positive, metavar="N", help="training steps")
    new.add_argument("--quick", action="store_true", help="a few texts and steps: seconds, but no result")


def _demo(options: argparse.Namespace) -> int:
    try:
        from peftfn.demo import Settings, run
    except ModuleNotFoundError as e:
        print(f"peftfn demo needs {e.name}: pip install 'peftfn[demo]'", file=sys.stderr)
        return 1
    settings = Settings.quick() if options.quick else Settings()
    given = {k: v for k in ("seeds", "steps") if (v := getattr(options, k)) is not None}
    try:
        return run(options.out, replace(settings, **given))
    except ModuleNotFoundError as e:
        print(e, file=sys.stderr)
        return 1


def add_compare(command: Command) -> None:
    new = command(
        "compare",
        _compare,
        "compare methods on real data, each at its own best learning rate",
        "Trains every method on every task at a grid of learning rates and seeds, in a sweep, and writes a record of "
        "each pair and a page. Run it again to go on. Needs no network and no GPU.",
    )
    new.add_argument("--out", type=Path, default="compare_out", metavar="DIR", help="output folder (%(default)s)")
    new.add_argument("--methods", type=names, metavar="A,B", help="which methods, in this order (all)")
    new.add_argument("--tasks", type=names, metavar="A,B", help="which of digits, characters, news, reviews (all)")
    new.add_argument("--rates", type=rates, metavar="X,Y", help="learning rates (3e-4 to 1, two a decade)")
    new.add_argument("--seeds", type=positive, metavar="N", help="of each rate (3)")
    new.add_argument("--steps", type=positive, metavar="N", help="of training (60)")
    new.add_argument(
        "--budget", type=float, metavar="MINUTES", help="begin nothing that would end later, by the last on its task"
    )
    new.add_argument(
        "--peft-results",
        type=Path,
        metavar="DIR",
        help="write the best runs there, as PEFT's own comparison stores them",
    )


def _compare(options: argparse.Namespace) -> int:
    try:
        from peftfn.compare import page, peft_results, plot, run
    except ModuleNotFoundError as e:
        print(f"peftfn compare needs {e.name}: pip install 'peftfn[demo]'", file=sys.stderr)
        return 1
    o = options
    given = {k: v for k in ("rates", "seeds", "steps") if (v := getattr(o, k)) is not None}
    only = {k: v for k in ("methods", "tasks") if (v := getattr(o, k)) is not None}
    try:
        records = run.compare(o.out, **only, settings=run.Settings(**given), minutes=o.budget)
    except ModuleNotFoundError as e:
        print(e, file=sys.stderr)
        return 1
    if o.peft_results is not None:
        print(f"{peft_results.write_runs(records, o.peft_results)} runs written to {o.peft_results}")
    drawn = plot.pareto(records, o.out / page.PICTURE)
    (o.out / "comparison.md").write_text(page.page(records, picture=drawn), encoding="utf-8")
    print(f"written to {o.out}: {len(records)} records, comparison.md{f', {page.PICTURE}' if drawn else ''}")
    return 0
