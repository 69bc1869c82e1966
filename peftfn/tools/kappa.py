"""Which layers to adapt, by the condition numbers of their weights: `pf.suggest.targets`."""

from torch import nn

from peftfn.core.method import Method, Weight
from peftfn.core.numbers import checks_numbers
from peftfn.model.choice import Modules, matched
from peftfn.model.model import Model
from peftfn.model.site import Site, is_conv1d
from peftfn.tools.singular import condition, matrix_of
from peftfn.tools.suggestion import Suggested, Suggestion

EXPERTS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")
"""What transformers calls experts in one parameter, by which PEFT finds them: a class token has three axes too."""


@checks_numbers
def targets(
    model: nn.Module,
    method: Method,
    modules: Modules | None = None,
    *,
    share: float | None = None,
    count: int | None = None,
    at_most: float | None = None,
    largest: int = 16384,
) -> Suggestion:
    """Suggest the layers whose weights have the lowest condition numbers κ = σ₁/(σ_n + 1e-8): KappaTune.

    "The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units", 2025, arXiv:2506.16289:
    weights whose singular values are alike hold less that training could overwrite. The choice is that of PEFT's
    `find_kappa_target_modules`; experts in one parameter [experts, out, in] count with the mean of their κ, and are
    chosen from among each other.

    Memory: one weight at a time, in fp32. A singular value decomposition of each weight takes minutes on large models.

    Args:
        model: the model to adapt.
        method: the method of the rules.
        modules: the layers to choose from, as for `pf.targets`; None: all linear layers, the output's too, and experts
            in one parameter by their usual names (gate_up_proj, down_proj, gate_proj, up_proj).
        share: choose this share of them, in (0, 1], rounded down, but at least one. 0.2 if nothing is given.
        count: or this many.
        at_most: or all whose κ is at most this.
        largest: leave weights with a longer side out.

    Returns:
        Rules for `adapt`, which print as a table, the lowest κ first.

    Raises:
        TypeError: `method` is no method for weights.
        ValueError: more than one of share, count and at_most, or one out of range; no layer to choose from, or none
            with so low a κ; a weight without finite values.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        found = pf.suggest.targets(model, pf.LoRA(rank=2), share=0.5)
        net = pf.adapt(model, found)
    """
    _check_choice(share, count, at_most)
    if not isinstance(method, Weight):
        raise TypeError(f"suggest.targets: {method!r} is no method for weights; give one, like peftfn.LoRA(rank=8)")
    known = Model.of(model)
    groups = _candidates(known, method, modules)
    rows: list[Suggested] = []
    chosen: list[str] = []
    rank = getattr(method, "rank", None)
    none = None if rank is None else 0
    for sites in groups:
        found = {s.name: condition(matrix_of(s, known.weights[s.name])) for s in sites if _fits(s, largest)}
        order = sorted(found, key=lambda n: found[n])
        if at_most is not None:
            picked = [n for n in order if found[n] <= at_most]
        else:
            wanted = count if count is not None else max(1, int(len(order) * (0.2 if share is None else share)))
            picked = order[:wanted]
        chosen += picked
        rows += [Suggested(n, found[n], rank if n in picked else none, n in picked) for n in order]
        rows += [Suggested(s.name, None, none, False) for s in sites if s.name not in found]
    if not chosen:
        raise ValueError(_why_none(rows, at_most, largest))
    return Suggestion("κ", rows, {n: method for n in known.sites if n in chosen})


def _why_none(rows: list[Suggested], at_most: float | None, largest: int) -> str:
    """Why no layer is chosen."""
    values = {r.name: r.value for r in rows if r.value is not None}
    if not values:
        return f"suggest.targets: all {len(rows)} weights have a side longer than {largest}: give a larger `largest`"
    name = min(values, key=lambda n: values[n])
    return (
        f"suggest.targets: at_most is {at_most}, and the lowest condition number is {values[name]:.3g}, that of {name}:"
        " give a larger one"
    )


def _candidates(known: Model, method: Weight, modules: Modules | None) -> list[list[Site]]:
    """The layers to choose from, and the stacks of experts, which are chosen apart. ValueError if there is neither."""
    names = None if modules is None else set(matched(known, modules))
    layers, stacks = [], []
    for site in known.sites.values():
        if site.kind not in method.kinds or (names is not None and site.module not in names):
            continue
        if site.kind in ("linear", "linear_t") and _is_linear(known, site):
            layers.append(site)
        elif site.stacked and (names is not None or site.name.rpartition(".")[2] in EXPERTS):
            stacks.append(site)
    if not layers and not stacks:
        seen = "no linear layer and no stack of experts" if modules is None else f"{modules!r} matches none"
        raise ValueError(
            f"suggest.targets: {seen} that {type(method).__name__} supports; peftfn.describe(model) lists what there is"
        )
    return [group for group in (layers, stacks) if group]


def _is_linear(known: Model, site: Site) -> bool:
    """Whether it is the weight of a linear layer, and not some other matrix (a position table, a recurrent weight)."""
    module = known.modules[site.module]
    return site.name.endswith("weight") and (isinstance(module, nn.Linear) or is_conv1d(module) or site.quantised)


def _fits(site: Site, largest: int) -> bool:
    return max(site.matrix_shape()) <= largest


def _check_choice(share: float | None, count: int | None, at_most: float | None) -> None:
    if sum(x is not None for x in (share, count, at_most)) > 1:
        raise ValueError(
            f"suggest.targets: share is {share}, count is {count} and at_most is {at_most}; give one of the three"
        )
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"suggest.targets: share is {share}; it is a share of the layers: give 0 < share <= 1")
    if count is not None and count < 1:
        raise ValueError(f"suggest.targets: count is {count}; give count >= 1")
    if at_most is not None and not at_most >= 1:
        raise ValueError(f"suggest.targets: at_most is {at_most}; a condition number is at least 1: give at_most >= 1")
