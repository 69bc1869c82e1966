"""Which layers to adapt, and with which ranks: pure functions that look at weights or gradients and return rules.

    function          what it looks at                        what it suggests
    targets           the weights' condition numbers          the layers, as PEFT's KappaTune
    gradient_ranks    the gradient of a loss, over batches    ranks
    weight_ranks      the weights themselves                  ranks
    change_ranks      what a full fine-tune changed           ranks

What they return is a mapping of patterns to methods, so it goes to `adapt` as it is, and it prints as a table.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peftfn.core.method import MATRIX, Method
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Entry
from peftfn.methods.parts.lowrank import Ranked
from peftfn.model.model import Model
from peftfn.net.net import Adapted, check_net
from peftfn.tensors.precision import wide
from peftfn.tools.change import check_energy
from peftfn.tools.kappa import targets
from peftfn.tools.observe import see_gradients
from peftfn.tools.singular import Sketch, Spectrum, available, matrix_of, shared_out
from peftfn.tools.start_nets import same_alpha
from peftfn.tools.suggestion import Suggested, Suggestion

__all__ = ["Suggested", "Suggestion", "change_ranks", "gradient_ranks", "targets", "weight_ranks"]

Loss = Callable[[Any, Any], Tensor]
"""(the model's output, the batch) ↦ a scalar"""


@checks_numbers
def gradient_ranks(
    net: Adapted,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    budget: int | None = None,
    energy: float | None = None,
    most: int | None = None,
    sketch: int | None = None,
) -> Suggestion:
    """Suggest ranks by the singular values of the loss's gradient G in each adapted weight.

    A step along the best rank-r part of G lowers the loss by the sum of its r largest σ², to first order. With a budget
    the ranks go to the largest σ² of all sites together, so no other ranks of the same total allow a steeper first
    step. A site that gets none is left out; scales stay what they are.

    Memory: the sum of each weight's gradients in fp32, whatever the number of batches, and one gradient of the batch at
    a time. `sketch=k` keeps (3k + 1)·(out + in) numbers of each sum in place of out·in: enough for gradients of a rank
    up to k, and for those whose singular values fall fast; values that fall slowly come out too large.

    Args:
        net: a net with LoRA, or a variant of it, at the sites to compare.
        batches: as for `starts.eva`: read once, so a generator will do; the mean of their gradients counts.
        loss: (output, batch) ↦ a scalar; None: the output's `loss`.
        budget: the sum of the ranks; None, without `energy`: what it is now.
        energy: in (0, 1]: at each site the smallest rank that holds this share of Σ σ².
        most: the largest rank of a site; None: the weight's smaller side.
        sketch: None keeps each sum whole; k a sketch of it: give a few times the largest rank that you want.

    Returns:
        Rules for `adapt`, which print as a table: all of the net's, with other ranks.

    Raises:
        ValueError: there are no batches, no loss, or a loss that a weight does not enter; the gradient is zero; both
            budget and energy, or one out of range; no site with a rank; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        found = pf.suggest.gradient_ranks(net, [torch.randn(3, 8)], loss=lambda out, batch: out.square().mean())
        net = pf.adapt(net.model, found)
    """
    check_net("gradient_ranks", net)
    sites = _ranked("suggest.gradient_ranks", net, quantised=False)
    _check_ranks("suggest.gradient_ranks", budget, energy, most)
    if sketch is not None and sketch < (most or 1):
        raise ValueError(f"suggest.gradient_ranks: sketch is {sketch}; it must hold `most` ranks: give >= {most or 1}")
    sums = {n: Sketch(e.site, sketch) for n, e in sites.items()}

    def see(name: str, g: Tensor) -> None:
        sums[name].add(wide(sites[name].site.canonical(g)))

    see_gradients("suggest.gradient_ranks", net, sites, batches, loss, see)
    spectra = {n: sums.pop(n).spectrum() for n in sites}
    return _suggestion("suggest.gradient_ranks", net, sites, spectra, "gradient", budget, energy, most)


@checks_numbers
def weight_ranks(
    net: Adapted, *, budget: int | None = None, energy: float | None = None, most: int | None = None
) -> Suggestion:
    """Suggest ranks by the singular values of the adapted weights.

    With a budget the ranks go to the components that hold the largest shares σ²/Σσ² of their own weight, so that the
    size of a weight does not count: as `starts.eva` shares ranks out, with weights in place of inputs. With an energy a
    weight whose singular values are alike gets a large rank, one that is nearly of low rank a small one.

    Memory: one weight at a time, in fp32.

    Args:
        net, budget, energy, most: as for `gradient_ranks`.

    Returns:
        Rules for `adapt`, which print as a table.

    Raises:
        ValueError: as for `gradient_ranks`; every weight is zero, or one has values that are not finite.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net = pf.adapt(net.model, pf.suggest.weight_ranks(net, energy=0.5))
    """
    check_net("weight_ranks", net)
    sites = _ranked("suggest.weight_ranks", net, quantised=True)
    _check_ranks("suggest.weight_ranks", budget, energy, most)
    weights, spectra = net.weights, {}
    for n, e in sites.items():
        spectra[n] = Spectrum.of(matrix_of(e.site, weights[n])).relative()
    return _suggestion("suggest.weight_ranks", net, sites, spectra, "weight", budget, energy, most)


@checks_numbers
def change_ranks(
    net: Adapted,
    full: nn.Module | Mapping[str, Tensor],
    *,
    budget: int | None = None,
    energy: float | None = None,
    most: int | None = None,
) -> Suggestion:
    """Suggest ranks by the singular values of what a full fine-tune changed of the adapted weights.

    With a budget, no other ranks of the same total come nearer to the change: Σ ‖Δ − Δ_r‖² over the sites is least.
    `pf.extract` makes an adapter of such a change; this says how to train one.

    Memory: one difference at a time, in fp32.

    Args:
        net, budget, energy, most: as for `gradient_ranks`.
        full: the fine-tuned model, or its parameters by the base's names.

    Returns:
        Rules for `adapt`, which print as a table.

    Raises:
        ValueError: as for `gradient_ranks`; a parameter is missing, or has another shape, or nothing differs.

    Example:
        base, tuned = (torch.nn.Sequential(torch.nn.Linear(8, 4)) for _ in range(2))
        net = pf.adapt(base, {"0.weight": pf.LoRA(rank=2)})
        net = pf.adapt(base, pf.suggest.change_ranks(net, tuned, energy=0.9))
    """
    check_net("change_ranks", net)
    sites = _ranked("suggest.change_ranks", net, quantised=True)
    _check_ranks("suggest.change_ranks", budget, energy, most)
    theirs: Mapping[str, Any] = Model.of(full).weights if isinstance(full, nn.Module) else full
    weights, spectra = net.weights, {}
    for n, e in sites.items():
        new = theirs.get(n)
        if new is None or new.shape != e.site.shape:
            seen = "missing" if new is None else f"{list(new.shape)}"
            raise ValueError(f"suggest.change_ranks: {n} is {list(e.site.shape)} here, and {seen} in the fine-tune")
        old = matrix_of(e.site, weights[n])
        spectra[n] = Spectrum.of(matrix_of(e.site, new).to(old) - old)
    return _suggestion("suggest.change_ranks", net, sites, spectra, "change", budget, energy, most)


# Which sites, and which ranks.


def _ranked(where: str, net: Adapted, quantised: bool) -> dict[str, Entry]:
    """The sites whose method has a rank. ValueError if there is none, or a quantised one where that has no gradient."""
    out = {n: e for n, e in net.plan.items() if isinstance(e.method, Ranked) and e.site.kind in MATRIX}
    if not out:
        raise ValueError(f"{where}: the net has no LoRA or variant of it, so there is no rank to choose")
    for n, e in out.items():
        if e.site.quantised and not quantised:
            raise ValueError(f"{where}: {n} is quantised, and has no gradient; use the model with its full weights")
    return out


def _suggestion(
    where: str,
    net: Adapted,
    sites: Mapping[str, Entry],
    spectra: Mapping[str, Spectrum],
    what: str,
    budget: int | None,
    energy: float | None,
    most: int | None,
) -> Suggestion:
    """The net's rules with ranks by these σ²."""
    there = available(spectra, most)
    if not there:
        raise ValueError(f"{where}: the {what} is zero at every site, so there is nothing to go by")
    if energy is not None:
        ranks = {n: min(r := v.rank(energy), r if most is None else most) for n, v in spectra.items()}
    else:
        now = sum(e.method.rank for e in sites.values())  # type: ignore[attr-defined]
        if budget is not None and budget > there:
            raise ValueError(
                f"{where}: budget is {budget}, and the {len(sites)} sites have {there} components to give ranks to"
                f"{'' if most is None else f', at most {most} each'}: give budget <= {there}"
            )
        ranks = shared_out(spectra, now if budget is None else budget, most)
    methods: dict[str, Method] = {}
    for n, e in net.plan.items():
        method: Any = e.method
        if n not in ranks:
            methods[n] = method
        elif ranks[n]:
            methods[n] = replace(method, rank=ranks[n], alpha=same_alpha(method, ranks[n]))
    rows = [Suggested(n, spectra[n].held(r), r, r > 0) for n, r in ranks.items()]
    return Suggestion("share held", rows, methods)


def _check_ranks(where: str, budget: int | None, energy: float | None, most: int | None) -> None:
    if budget is not None and energy is not None:
        raise ValueError(f"{where}: budget is {budget} and energy is {energy}; give at most one of the two")
    if budget is not None and budget < 1:
        raise ValueError(f"{where}: budget is {budget}; it is the sum of the ranks: give budget >= 1")
    if most is not None and most < 1:
        raise ValueError(f"{where}: most is {most}; it is the largest rank of a site: give most >= 1")
    check_energy(where, energy)
