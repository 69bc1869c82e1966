"""Speed, as paired ratios: `python -m benchmarks` runs everything and writes docs/benchmarks.md. See harness.py."""
