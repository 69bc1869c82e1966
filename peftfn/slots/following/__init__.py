"""What each function of torch does to the rows of its inputs: one rule a function, in a table (table.py).

A rule is a pure function: (a call, what it gave) ↦ the tag of that. A tag says whose position it is, not what flowed
in: attention's output belongs to its query, a @ b to a's row. Functions that only move positions need no arithmetic:
the same function of the tag, expanded in the dimensions that the function looks at, is the tag. What has no rule loses
the rows, so a rule that is left out is an error somewhere, never a wrong value.
"""

from peftfn.slots.following import attention, images, indexing, pointwise, products, reductions, views, writes
from peftfn.slots.following.table import LEAKS, RULES, SILENT
from peftfn.slots.track import Followed, Tracking

__all__ = ["attention", "images", "indexing", "pointwise", "products", "reductions", "tracking", "views", "writes"]


def tracking(call: Followed) -> Tracking:
    return Tracking(call, RULES, SILENT, LEAKS)
