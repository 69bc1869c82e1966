"""Merging by sums of changes, and by their singular vectors and values: see `merging.py`."""

from collections.abc import Sequence

from torch import Tensor

from peftfn.core.method import MATRIX
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted
from peftfn.tools import rules
from peftfn.tools.merge_job import Job, Pairs


@checks_numbers
def linear(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters into Σ w_t Δ_t.

    Without rank and energy it is exact, and works on the factors alone: LoRAs become one of the summed rank, whose B
    has the weights in it. Adapters of one method that is linear in its tensors (`Full`, `MiSS`, `SHiRA` with the same
    places) stay adapters of that method. One adapter with the weight 1 is returned as it is, whatever its method.
    (PEFT's "linear" adds the As and the Bs, which has cross terms; this is its "cat", and with a rank its "svd".)

    Args:
        adapters: (net, adapter) pairs on one model.
        weights: a number for each, also negative; None for 1 each. A tensor is differentiable.
        rank: the rank of the result at every site: the nearest one, from a singular value decomposition of the factors.
        energy: in (0, 1]: the smallest rank at each site that holds this share of Σ σ².

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: the pairs are of different models, the weights do not fit, a rank is too large, a method depends on
            the input, or there is no exact sum of a small rank; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.linear(pairs, [1.0, -0.5])
        assert merged["0.weight"]["a"].shape == (4, 8)
    """
    job = Job("linear", adapters, weights, rank, energy)
    return job.unchanged() or job.merged(lambda name, cs: rules.weighted_sum(cs, job.weights), exact=True)


@checks_numbers
def tsv(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    keep: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters by TSV-M: the largest singular vectors of each, made orthogonal to those of the others.

    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", 2024, arXiv:2412.00081.
    With U = [U_1 … U_T] and V alike, each U_t of `keep` columns, the result is U⊥ diag(w_1 S_1, …, w_T S_T) V⊥ᵀ, where
    X⊥ = X (XᵀX)^−½ is the nearest matrix with orthonormal columns. Its rank is at most the sum of what is kept.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        keep: singular components of each adapter; None for the paper's min(out, in)/T, or all that there are.

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `linear`; a `keep` below 1, or too many components for the weight.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.tsv(pairs)
    """
    job = Job("tsv", adapters, weights, rank, energy)
    for name, site in job.sites.items():
        most = min(site.matrix_shape()) if site.kind in MATRIX else None
        if keep is not None and (keep < 1 or (most is not None and keep * len(job.pairs) > most)):
            raise ValueError(
                f"{name}: keep is {keep} for each of {len(job.pairs)} adapters; their singular vectors must fit into "
                f"the weight's smaller side: give 1 <= keep <= {max(1, (most or 1) // len(job.pairs))}"
            )
    whole = keep is None or all(keep >= rules.rank_of(c) for c in job.single() if c.site.kind in MATRIX)
    return (job.unchanged() if whole else None) or job.merged(lambda name, cs: rules.tsv(cs, job.weights, keep))


@checks_numbers
def iso_c(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters by Iso-C: Σ w_t Δ_t = U S Vᵀ with all of its singular values made equal, σ̄ U Vᵀ.

    Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", 2025,
    arXiv:2502.04959. σ̄ is the mean of the singular values of the sum; of low-rank changes only of those that are not
    zero, as the paper's own mean over a weight's whole side would be of almost nothing but zeros.

    Args:
        adapters, weights, rank, energy: as for `linear`.

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `linear`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.iso_c(pairs)
    """
    job = Job("iso_c", adapters, weights, rank, energy)
    return job.merged(lambda name, cs: rules.iso(rules.weighted_sum(cs, job.weights)))
