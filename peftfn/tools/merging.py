"""Merge several adapters into one: pure functions of (net, adapter) pairs and weights.

Each takes the pairs, which all belong to one model and may differ in method, rank and sites, and returns a net of LoRAs
of scale 1 and its adapter. A site that an adapter lacks counts as no change. What is no matrix (a norm) becomes `Full`.

    function                                 for each site
    linear                                   Σ w_t Δ_t, exactly
    magnitude, ties, dare, della             a rule for the entries of the Δ_t, in the space that you choose
    tsv, iso_c                               a rule for their singular vectors and values

`space` says where the rule's entries are: "dense" is the weight's own, whose result has full rank, so that it wants
`rank` or `energy`; "core" (Core Space) and "knots" (KnOTS) are made of the adapters' factors, and their result has at
most the sum of their ranks; "shared" (Compress-then-Merge) has the rank of the result before anything is merged.
"""

from peftfn.tools.merge_entries import dare, della, magnitude, ties
from peftfn.tools.merge_sums import iso_c, linear, tsv

__all__ = ["dare", "della", "iso_c", "linear", "magnitude", "ties", "tsv"]
