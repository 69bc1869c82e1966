"""verify: is the adapter applied, everywhere, and does every way to apply it give the same?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from peftfn.core.combine import scale
from peftfn.core.numbers import at_least_zero, checks_numbers
from peftfn.core.plan import Plan
from peftfn.net.net import Adapted, check_net
from peftfn.tensors.tree import leaves
from peftfn.tools.observe import call_of, unadapted
from peftfn.tools.report import MergedSite, merge_report, share, short
from peftfn.tools.table import table


@dataclass(frozen=True)
class VerifiedSite:
    """What an adapter does at one site.

    Args:
        name: the site.
        merged: ‖Δ‖ / ‖W‖ and what merging would lose; None where the method depends on the input.
        effect: ‖y − y'‖ / ‖y₀‖, y' being the output without this site and y₀ the base's; None if it was not asked for.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), {"0.weight": pf.LoRA(rank=2)})
        (site,) = pf.verify(net, net.init(), torch.randn(3, 8)).sites
        assert site.effect == 0
    """

    name: str
    merged: MergedSite | None
    effect: float | None


@dataclass(frozen=True)
class Verification:
    """What `verify` returns. It prints as a table.

    Args:
        sites: each site's change, its effect, and what merging would lose.
        effect: ‖y − y₀‖ / ‖y₀‖ of the whole adapter, on this batch.
        differs: "merged" and each name in `others` → ‖y' − y‖ / ‖y − y₀‖: the share of the adapter's effect by which
            that way to apply it differs from `net.apply`.
        problems: what is wrong, one sentence each.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), {"0.weight": pf.LoRA(rank=2)})
        assert not pf.verify(net, net.init(), torch.randn(3, 8)).ok  # a fresh adapter changes nothing
    """

    sites: tuple[VerifiedSite, ...]
    effect: float
    differs: Mapping[str, float]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def json(self) -> dict[str, Any]:
        """Return plain values, for `json.dumps`.

        Returns:
            The fields, as dicts and lists of numbers and strings.
        """
        return asdict(self) | {"differs": dict(self.differs), "ok": self.ok}

    def __str__(self) -> str:
        rows = [("site", "‖Δ‖/‖W‖", "effect", "lost by merging")]
        for s in self.sites:
            size, lost = ("-", "-") if s.merged is None else (short(s.merged.size), share(s.merged.lost))
            rows.append((s.name, size, "-" if s.effect is None else short(s.effect), lost))
        lines = [table(rows), "", f"the adapter changes the output by {share(self.effect)} of the base's"]
        lines += [f"{name} differs from apply by {share(d)} of that change" for name, d in self.differs.items()]
        lines += [f"PROBLEM: {p}" for p in self.problems] or ["no problems"]
        return "\n".join(lines)


@checks_numbers
def verify(
    net: Adapted,
    adapter: Mapping[str, Any],
    batch: Any,
    *,
    others: Mapping[str, Any] | None = None,
    tolerance: float = 0.05,
    effects: bool = True,
    dtype: torch.dtype | None = None,
) -> Verification:
    """Check that an adapter is applied, everywhere, and that every way to apply it gives the same.

    It runs the base, the adapted and the merged model on a batch, and the adapted model once more for each site,
    without that site. Problems are: a tensor that is not finite; a site whose change is zero, or has no effect on the
    output; a way to apply the adapter that differs from `net.apply` by more than `tolerance` of the adapter's effect.

    Args:
        net: the adapter's net, its model in eval mode.
        adapter: an adapter of it.
        batch: what the model is called with: a dict of keyword arguments, a tuple of arguments, or one argument.
        others: name → what other software returned for this batch: a tensor, or an output with `logits`.
        tolerance: the share of the effect that another way may differ by.
        effects: whether to measure each site's effect on the output, which takes a call for each.
        dtype: of the merged weights that the sites' losses are about; None for that of each weight.

    Returns:
        A `Verification`: `ok`, `problems`, and the figures.

    Raises:
        ValueError: the model is in train mode, or an output in `others` has another shape.
        TypeError: the model returns no tensor.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        found = pf.verify(net, net.init(), torch.randn(3, 8))
        assert found.ok, found
    """
    check_net("verify", net)
    at_least_zero("verify", tolerance=tolerance)
    if net.model.training:
        raise ValueError(
            "verify: the model is in train mode, where dropout makes calls differ; call model.eval() first"
        )
    args, kwargs = call_of(batch)
    with torch.no_grad():
        base = _output(unadapted(net).apply({}, *args, **kwargs))
        y = _output(net.apply(adapter, *args, **kwargs))
        sites = tuple(_sites(net, adapter, dtype, (lambda a: _output(net.apply(a, *args, **kwargs))), y, base, effects))
        whole = _norm(y - base)
        differs: dict[str, float] = {}
        problems = _problems(net, adapter, sites, whole)
        try:
            params = net.merge(adapter)
        except ValueError as e:
            problems.append(f"it cannot be merged: {e}")
        else:
            if not any(e.site.quantised for e in net.plan.values()):
                merged = _output(unadapted(net).apply({}, *args, params=params, **kwargs))
                differs["merged"] = _norm(merged - y) / max(whole, _tiny(y))
        for name, other in (others or {}).items():
            theirs = _output(other)
            if theirs.shape != y.shape:
                raise ValueError(f"verify: {name} returned {list(theirs.shape)}, and the adapted model {list(y.shape)}")
            differs[name] = _norm(theirs.to(y) - y) / max(whole, _tiny(y))
    for name, d in differs.items():
        if not d <= tolerance and not (whole == 0 and d == 0):
            problems.append(
                f"{name} differs from apply by {share(d)} of the adapter's effect, more than {share(tolerance)}"
            )
    return Verification(sites, whole / max(_norm(base), _tiny(y)), differs, tuple(problems))


def _sites(
    net: Adapted,
    adapter: Mapping[str, Any],
    dtype: torch.dtype | None,
    run: Any,
    y: Tensor,
    base: Tensor,
    effects: bool,
) -> list[VerifiedSite]:
    mergeable = {n for n, e in net.plan.items() if e.method.mergeable}
    part = Adapted(net.model, Plan({n: net.plan[n] for n in mergeable}, net.plan.rules, net.plan.banks))
    report = merge_report(part, {n: adapter[n] for n in (*part.plan, *part.plan.banks)}, dtype) if mergeable else ()
    found = {s.name: s for s in report}
    out = []
    for name in net.plan:
        effect = None
        if effects:
            without = dict(adapter) | scale({name: adapter[name]}, 0.0) if name in mergeable else None
            effect = None if without is None else _norm(run(without) - y) / max(_norm(base), _tiny(y))
        out.append(VerifiedSite(name, found.get(name), effect))
    return out


def _problems(net: Adapted, adapter: Mapping[str, Any], sites: tuple[VerifiedSite, ...], whole: float) -> list[str]:
    out = [f"{n}: the adapter has values that are not finite" for n in adapter if not _finite(adapter[n])]
    nothing = [
        s.name for s in sites if s.merged is not None and s.merged.size == 0 and not net.plan[s.name].changes_bias
    ]
    unused = [s.name for s in sites if s.effect == 0 and s.name not in nothing]
    if whole == 0:
        out.append("the adapter does not change the output")
    if nothing:
        out.append(f"the change is zero at {_some(nothing, len(sites))}")
    if unused and whole != 0:
        out.append(f"the change has no effect on this output at {_some(unused, len(sites))}")
    return out


def _some(names: list[str], of: int) -> str:
    return f"{len(names)} of {of} sites, {names[0]} first"


def _finite(tree: Mapping[str, Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in leaves(tree))


def _output(out: Any) -> Tensor:
    """The tensor that an output is about: its logits, or the first floating tensor."""
    found = getattr(out, "logits", out)
    if isinstance(found, Mapping):
        found = tuple(found.values())
    while isinstance(found, tuple | list) and found:
        found = next((f for f in found if isinstance(f, Tensor) and f.is_floating_point()), found[0])
    if not isinstance(found, Tensor):
        raise TypeError(f"verify: the model returns a {type(out).__name__}; give one that returns tensors")
    return found.detach().double()


def _norm(x: Tensor) -> float:
    return float(x.norm())


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
