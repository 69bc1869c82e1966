"""Fused operations, one a file: each has a plain-torch form that runs anywhere, and is what it means.

`use("torch" | "triton" | "auto")` forces a form, or leaves the choice to the rules in `choose.py`.
"""

from peftfn.kernels.choose import use

__all__ = ["use"]
