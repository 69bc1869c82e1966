"""Claims of papers, tried at a small scale: `python -m benchmarks.reproductions` runs them and writes the page."""
