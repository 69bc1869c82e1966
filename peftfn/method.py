"""What a method is made of: the names that a method of your own imports."""

import peftfn.methods  # noqa: F401 - fills the registry
from peftfn.core.indices import Index
from peftfn.core.method import ALL, LINEAR, MATRIX, Cases, Leaf, LowRank, Method, Padding, Product, Weight, registry
from peftfn.core.peft import Peft

__all__ = [
    "ALL",
    "LINEAR",
    "MATRIX",
    "Cases",
    "Index",
    "Leaf",
    "LowRank",
    "Method",
    "Padding",
    "Peft",
    "Product",
    "Weight",
    "registry",
]
