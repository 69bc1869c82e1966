"""Arrow: experts found by the main input direction of their changes, without data or training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.functions import bank_of, current
from peftfn.core.numbers import checks_numbers
from peftfn.many.routing import Route, of_site, top_k
from peftfn.many.stack import unstack
from peftfn.net.net import Adapted, check_net


@checks_numbers
def arrow(
    net: Adapted,
    experts: Mapping[str, Any],
    k: int = 3,
    temperature: float = 1.0,
    *,
    steps: int | None = None,
    seed: int = 42,
) -> Route:
    """Return the routing of Arrow: gates are the top-k softmax of |x·v_j|, v_j being expert j's main input direction.

    Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024, arXiv:2405.11157. v_j is
    the first right singular vector of the change of expert j at the site: no data and no training. Pass what it
    returns to `net.gated` as gates, with the same experts.

    Args:
        net: the net of the experts.
        experts: a stack of adapters whose methods have a change (a `delta`).
        k: experts that act on a token; all of them if there are fewer.
        temperature: of the softmax.
        steps: None computes v_j exactly; a number runs so many steps of the power iteration from a random vector, as
            PEFT does (15 steps there, which may stop short of v_j and so route some tokens otherwise).
        seed: of that vector.

    Returns:
        A function (site, x) ↦ gates.

    Raises:
        KeyError: the experts are those of another net.
        ValueError: a method without a change, or a site that has no input vector (a norm, an embedding); k, temperature
            or steps out of range. In the call, a site that the net had not; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        many = pf.stack([net.init(seed=s) for s in range(4)])
        y = net.gated(many, pf.routing.arrow(net, many, k=2), torch.randn(3, 8))
    """
    check_net("arrow", net)
    if k < 1 or not temperature > 0 or (steps is not None and steps < 1):
        raise ValueError(
            f"arrow: k={k}, temperature={temperature} and steps={steps}; give k >= 1, a temperature above 0, and steps "
            "of at least 1, or None"
        )
    adapters = unstack(experts)
    for a in adapters:
        net.plan.check(a)
    with torch.no_grad():
        found = [_prototypes(net, a, steps, seed) for a in adapters]
    prototypes = {site: torch.stack([one[site] for one in found]) for site in found[0]}

    def route(site: str, x: Tensor) -> Tensor:
        v = of_site("arrow", prototypes, site, x, 2).to(x)
        return top_k((x @ v.mT).abs(), min(k, len(v)), temperature)

    return route


def _prototypes(net: Adapted, adapter: Mapping[str, Any], steps: int | None, seed: int) -> dict[str, Tensor]:
    """The first right singular vector of an adapter's change at each site."""
    weights, out = net.weights, dict[str, Tensor]()
    for name, entry in net.plan.meant.items():
        if entry.site.kind not in ("linear", "linear_t"):
            raise ValueError(
                f"arrow: {name} is a {entry.site.kind} site, whose input is no vector to route by: leave it out"
            )
        w = entry.site.canonical(current(entry, weights[name]))
        method, p = entry.tensors(adapter[name], bank_of(entry, adapter), w)
        low = method.low_rank(p)
        up, down = (low.up, low.down) if low is not None and low.gain is None else _halves(entry.delta(method, p, w))
        out[name] = _power(up, down, steps, seed) if steps else _first(up, down)
    return out


def _halves(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A change as a product of two matrices."""
    return torch.eye(len(delta), dtype=delta.dtype, device=delta.device), delta


def _first(up: Tensor, down: Tensor) -> Tensor:
    """The first right singular vector of up·down, at the cost of the rank: down = Rᵀ Qᵀ, and Q keeps lengths."""
    q, r = torch.linalg.qr(down.mT.float())
    return q @ torch.linalg.svd(up.float() @ r.mT, full_matrices=False)[2][0]


def _power(up: Tensor, down: Tensor, steps: int, seed: int) -> Tensor:
    down, square = down.float(), up.float().mT @ up.float()
    generator = torch.Generator(device=down.device).manual_seed(seed)
    v = F.normalize(torch.randn(down.shape[1], generator=generator, device=down.device), dim=0)
    for _ in range(steps):
        v = F.normalize(down.mT @ (square @ (down @ v)), dim=0)
    return v


def without_general(experts: Mapping[str, Any], general: Mapping[str, Any]) -> dict[str, Any]:
    """Return experts less the mean of general adapters, tensor by tensor: GenKnowSub.

    As PEFT's Arrow does it, for A and B each by itself, so that it is a subtraction of knowledge in spirit and not of
    changes: B A − mean(B) mean(A) is another matrix. For a difference of changes, add `pf.scale(general, -1 / n)`.

    Args:
        experts: a stack of adapters.
        general: a stack of adapters of the same net.

    Returns:
        A stack like `experts`.

    Raises:
        ValueError: the two have other sites, or tensors of other shapes; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        task, general = (pf.stack([net.init(seed=s), net.init(seed=s + 1)]) for s in (0, 2))
        purified = pf.routing.without_general(task, general)
    """
    for site in (*experts, *general):
        mine, theirs = ({k: list(t.shape[1:]) for k, t in tree.get(site, {}).items()} for tree in (experts, general))
        if mine != theirs:
            raise ValueError(
                f"without_general: {site} has {mine or 'nothing'} in the experts and {theirs or 'nothing'} in the "
                "general adapters; give two stacks of one net"
            )
    return {site: {k: t - general[site][k].mean(0) for k, t in leaf.items()} for site, leaf in experts.items()}
