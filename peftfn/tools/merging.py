"""Merge several adapters into one: pure functions of (net, adapter) pairs and weights.

Each takes the pairs, which all belong to one model and may differ in method, rank and sites, and returns a net of LoRAs
of scale 1 and its adapter. A site that an adapter lacks counts as no change. What is no matrix (a norm) becomes `Full`.

    function                                 for each site
    linear                                   Σ w_t Δ_t, exactly
    magnitude, ties, dare, della             a rule for the entries of the Δ_t, in the space that you choose
    tsv, iso_c                               a rule for their singular vectors and values

`space` says where the rule's entries are: "dense" is the weight's own, whose result has full rank, so that it wants
`rank` or `energy`; "core" (Core Space) and "knots" (KnOTS) are made of the adapters' factors, and their result has at
most the sum of their ranks.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from peftfn.core.method import MATRIX
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted
from peftfn.tools import rules
from peftfn.tools.merge_job import Job, Pairs, Space
from peftfn.tools.rules import Elect

__all__ = ["dare", "della", "iso_c", "linear", "magnitude", "ties", "tsv"]


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


def magnitude(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    space: Space = "dense",
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters into Σ w_t prune(Δ_t), where prune keeps the share `density` of entries of largest magnitude.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        density: share of each matrix's entries to keep, in (0, 1].
        space: where the entries are: "dense", "core" or "knots".

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `linear`; a density outside (0, 1]; "dense" without rank or energy.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.magnitude(pairs, density=0.5, rank=2)
    """
    return Job("magnitude", adapters, weights, rank, energy).by(
        partial(rules.magnitude, density=density), space, density
    )


def ties(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float = 0.2,
    elect: Elect = "total",
    space: Space = "dense",
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters by TIES: trim each, elect a sign for each entry, and average those that have it.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, arXiv:2306.01708. As in PEFT, the
    sign is elected by the trimmed changes without weights, and the average is Σ w_t Δ_t over the number that agree.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        density: share of each matrix's entries to keep, in (0, 1].
        elect: the sign of the sum of the entries ("total") or of their signs ("frequency"; a draw goes by the total).
        space: where the entries are: "dense" (the paper), "core" or "knots" (KnOTS-TIES).

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `magnitude`; another word for `elect`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.ties(pairs, [1.0, 0.5], density=0.5, space="core")
    """
    rule = partial(rules.ties, density=density, elect=_word("ties", elect))
    return Job("ties", adapters, weights, rank, energy).by(rule, space, density)


def dare(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    elect: Elect | None = None,
    seed: int = 0,
    space: Space = "dense",
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters by DARE: drop entries at random, divide the others by `density`, and add them up.

    Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023,
    arXiv:2311.03099. Which entries are dropped depends on (seed, site, place among the adapters) alone.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        density: the probability of keeping an entry, in (0, 1].
        elect: as for `ties`, to merge what is left by TIES; None adds it up.
        seed: of what is dropped.
        space: where the entries are: "dense" (the paper), "core" or "knots".

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `ties`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.dare(pairs, density=0.7, elect="total", rank=2)
    """
    rule = partial(rules.dare, density=density, elect=_word("dare", elect))
    return Job("dare", adapters, weights, rank, energy, seed).by(rule, space, density)


def della(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    epsilon: float,
    elect: Elect | None = "total",
    seed: int = 0,
    space: Space = "dense",
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters by DELLA: as `dare`, but the entries of each row that are larger are kept more often.

    Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
    arXiv:2406.11617. The k-th smallest of a row's n entries is kept with the probability
    q = density − epsilon + 2·epsilon·(k − 1)/(n − 1), and divided by q.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        density: the mean probability of keeping an entry, in (0, 1].
        epsilon: how far the probabilities reach to both sides of it.
        elect: as for `ties`; None adds up what is left.
        seed: of what is dropped.
        space: where the entries are: "dense" (the paper), "core" or "knots".

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `ties`; density ± epsilon leaves (0, 1].

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.della(pairs, density=0.7, epsilon=0.2, rank=2)
    """
    if not (0 <= epsilon < density and density + epsilon <= 1):
        raise ValueError(
            f"della: density is {density} and epsilon {epsilon}; density − epsilon and density + epsilon are "
            "probabilities: give 0 <= epsilon < density <= 1 − epsilon"
        )
    rule = partial(rules.della, density=density, epsilon=epsilon, elect=_word("della", elect))
    return Job("della", adapters, weights, rank, energy, seed).by(rule, space, density - epsilon)


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


def _word(where: str, elect: Elect | None) -> Elect | None:
    if elect not in ("total", "frequency", None):
        raise ValueError(f"{where}: elect is {elect!r}; choose 'total' or 'frequency'")
    return elect
