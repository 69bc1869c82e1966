"""docs/comparison.md and its picture from the records here. `peftfn compare --out benchmarks/comparison` makes them."""

from benchmarks.comparison import HERE
from peftfn.compare.page import PICTURE, page
from peftfn.compare.plot import pareto
from peftfn.compare.run import read


def write_page() -> None:
    docs = HERE.parents[1] / "docs"
    records = read(HERE)
    pareto(records, docs / PICTURE)
    (docs / "comparison.md").write_text(page(records))
    print(f"comparison.md, {PICTURE}")


if __name__ == "__main__":
    write_page()
