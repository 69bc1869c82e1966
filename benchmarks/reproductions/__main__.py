"""python -m benchmarks.reproductions [names] [--quick]: try claims, write records, docs/reproductions.md and pictures.

What an interrupt leaves is gone on from. Without names, what has a record of this version already is run anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from benchmarks.reproductions import claims
from benchmarks.reproductions.claim import DOCS, RUNNING, read, save
from benchmarks.reproductions.page import page, picture, section


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproductions", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(claims.CLAIMS)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="seconds each: to see that it runs; print, write nothing")
    parser.add_argument("--page", action="store_true", help="run nothing: make the page from the records")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in claims.CLAIMS:
            parser.error(f"there is no reproduction {name!r}; choose from {', '.join(claims.CLAIMS)}")

    import torch

    torch.set_num_threads(args.threads)
    for name in () if args.page else args.names or claims.CLAIMS:
        print(f"{name}: {claims.CLAIMS[name].title}", flush=True)
        if args.quick:
            from tempfile import TemporaryDirectory

            with TemporaryDirectory() as folder:
                record = claims.CLAIMS[name].record(name, quick=True, folder=Path(folder))
        else:
            record = claims.CLAIMS[name].record(name)
            save(record)
            rmtree(RUNNING / name, ignore_errors=True)
            write_page()
        print(section(name, claims.CLAIMS[name], record), flush=True)
    if not args.quick:
        write_page()


def write_page() -> None:
    records = {name: record for name in claims.CLAIMS if (record := read(name))}
    for name, record in records.items():
        if (draw := claims.CLAIMS[name].draw) is not None:
            draw(record["figures"], DOCS / picture(name))
    (DOCS / "reproductions.md").write_text(page(claims.CLAIMS, records))


if __name__ == "__main__":
    main()
