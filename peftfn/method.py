"""What a method is made of: the names that a method of your own imports."""

from peftfn.core.method import (
    ALL,
    LINEAR,
    MATRIX,
    Cases,
    Leaf,
    LowRank,
    Method,
    Padding,
    Peft,
    Product,
    names,
    registry,
)

__all__ = [
    "ALL",
    "LINEAR",
    "MATRIX",
    "Cases",
    "Leaf",
    "LowRank",
    "Method",
    "Padding",
    "Peft",
    "Product",
    "names",
    "registry",
]
