"""python -m benchmarks [names] [--quick]: run benchmarks, write benchmarks/results/*.json, and what is
made from them: docs/benchmarks.md and the figures of README.md."""

import argparse
from importlib import import_module
from time import perf_counter

from benchmarks import readme, table
from benchmarks.harness import CLOCKS, QUICK, REPEATS, Options, pin, write

BENCHMARKS = (
    *("adapt", "around", "llama", "load", "memory", "merging", "methods", "mixed", "module", "routed", "routing"),
    *("shared", "starts", "steps", "tenants", "tools", "vmap"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks and tabulate them.")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repetitions, print only, write nothing")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; with more, a busy neighbour distorts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a quick look on a busy machine")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    options = Options(QUICK if args.quick else REPEATS, args.threads, args.clock)
    pin(options.threads)

    import torch

    torch.set_num_threads(options.threads)
    for name in args.names or BENCHMARKS:
        print(f"{name}: ratios as median [quartiles]", flush=True)
        start = perf_counter()
        rows = import_module(f"benchmarks.{name}").run(options)
        seconds = perf_counter() - start
        print(f"  {seconds:.0f} s", flush=True)
        if not args.quick:
            write(name, rows, options, seconds)
    if not args.quick:
        print(f"written: {table.write().name}, {readme.write().name}")
        for name in ("routed", "tenants"):  # whose figures another page has too
            if name in (args.names or BENCHMARKS):
                import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
