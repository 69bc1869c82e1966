"""Merging by rules for the entries of changes, in a space: see `merging.py`."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted
from peftfn.tools import rules
from peftfn.tools.merge_job import Job, Pairs, Space
from peftfn.tools.rules import Elect


@checks_numbers
def magnitude(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    space: Space = "dense",
    beta: float = 0.0,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Adapted, Adapter]:
    """Merge adapters into Σ w_t prune(Δ_t), where prune keeps the share `density` of entries of largest magnitude.

    Args:
        adapters, weights, rank, energy: as for `linear`.
        density: share of each matrix's entries to keep, in (0, 1].
        space: where the entries are: "dense", "core", "knots" or "shared" (Compress-then-Merge).
        beta: for "shared": how far the sizes of the changes count for the subspaces, from 0, all alike, to 1.

    Returns:
        (net, adapter) on the same model.

    Raises:
        ValueError: as for `linear`; a density outside (0, 1]; "dense" without rank or energy; "shared" without rank,
            or a beta outside [0, 1].

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pairs = [(net, net.init(0)), (net, net.init(1))]
        merged_net, merged = pf.merging.magnitude(pairs, density=0.5, rank=2)
    """
    return Job("magnitude", adapters, weights, rank, energy).by(
        partial(rules.magnitude, density=density), space, density, beta
    )


@checks_numbers
def ties(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float = 0.2,
    elect: Elect = "total",
    space: Space = "dense",
    beta: float = 0.0,
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
        space, beta: as for `magnitude`; "dense" is the paper's, "knots" is KnOTS-TIES.

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
    return Job("ties", adapters, weights, rank, energy).by(rule, space, density, beta)


@checks_numbers
def dare(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    elect: Elect | None = None,
    seed: int = 0,
    space: Space = "dense",
    beta: float = 0.0,
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
        space, beta: as for `magnitude`; "dense" is the paper's.

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
    return Job("dare", adapters, weights, rank, energy, seed).by(rule, space, density, beta)


@checks_numbers
def della(
    adapters: Pairs,
    weights: Sequence[float] | Tensor | None = None,
    *,
    density: float,
    epsilon: float,
    elect: Elect | None = "total",
    seed: int = 0,
    space: Space = "dense",
    beta: float = 0.0,
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
        space, beta: as for `magnitude`; "dense" is the paper's.

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
    return Job("della", adapters, weights, rank, energy, seed).by(rule, space, density - epsilon, beta)


def _word(where: str, elect: Elect | None) -> Elect | None:
    if elect not in ("total", "frequency", None):
        raise ValueError(f"{where}: elect is {elect!r}; choose 'total' or 'frequency'")
    return elect
