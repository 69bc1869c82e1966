"""Fused operations, one a file: each has a plain-torch form that runs anywhere."""
