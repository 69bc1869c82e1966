"""docs/comparison.md from the records beside this file. `peftfn compare --out benchmarks/comparison` makes them."""

from pathlib import Path

from peftfn.compare.page import page
from peftfn.compare.run import read

HERE = Path(__file__).parent

if __name__ == "__main__":
    path = HERE.parents[1] / "docs" / "comparison.md"
    path.write_text(page(read(HERE)))
    print(path.name)
