"""Routing: functions that say how much each expert of a stack acts, and mixtures whose router trains."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.functions import bank_of, current
from peftfn.many.stack import stack, unstack
from peftfn.net.net import Adapted
from peftfn.slots.routes import PerForward

Route = Callable[[str, Tensor], Tensor]
"""(site, its input [rows, …, in]) ↦ gates [rows, …, experts]"""


def top_k(scores: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return gates: the softmax of scores/temperature over the k largest scores, and zero for the others.

    Args:
        scores: [..., experts].
        k: how many experts act; at most the number of experts.
        temperature: below 1 sharpens, above 1 flattens.

    Returns:
        [..., experts], each vector with sum 1.

    Raises:
        ValueError: k is not in [1, experts], or temperature is not positive.

    Example:
        gates = pf.routing.top_k(torch.tensor([1.0, 3.0, 3.0]), k=2)
        assert gates.tolist() == [0.0, 0.5, 0.5]
    """
    if not 1 <= k <= scores.shape[-1] or temperature <= 0:
        raise ValueError(
            f"top_k: k={k} and temperature={temperature}; give k in [1, {scores.shape[-1]}] and a temperature above 0"
        )
    largest, at = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, at, torch.softmax(largest / temperature, -1))


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
        ValueError: a method without a change, or a site that has no input vector (a norm, an embedding).

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        many = pf.stack([net.init(seed=s) for s in range(4)])
        y = net.gated(many, pf.routing.arrow(net, many, k=2), torch.randn(3, 8))
    """
    with torch.no_grad():
        found = [_prototypes(net, a, steps, seed) for a in unstack(experts)]
    prototypes = {site: torch.stack([one[site] for one in found]) for site in found[0]}

    def route(site: str, x: Tensor) -> Tensor:
        v = prototypes[site].to(x)
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

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        task, general = (pf.stack([net.init(seed=s), net.init(seed=s + 1)]) for s in (0, 2))
        purified = pf.routing.without_general(task, general)
    """
    return {
        site: {k: t - general[site][k].mean(0) for k, t in leaf.items()} if isinstance(leaf, Mapping) else leaf
        for site, leaf in experts.items()
    }


def phatgoose(gates: Mapping[str, Tensor], k: int = 2) -> Route:
    """Return the routing of PHATGOOSE, by gate vectors that each expert trained for itself.

    Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization", 2024, arXiv:2402.05859.
    score_j = v̄_j·x̄ / √in over standardised vectors (mean 0, deviation 1), then the softmax over the k largest. Each
    expert's gate is trained alone, with its factors fixed: `sigmoid_gate` is that gate.

    Args:
        gates: {site: [experts, in]}, the experts' gate vectors.
        k: experts that act on a token.

    Returns:
        A function (site, x) ↦ gates, for `net.gated`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack([net.init(seed=0), net.init(seed=1)])
        y = net.gated(many, pf.routing.phatgoose({"0.weight": torch.randn(2, 8)}, k=1), torch.randn(3, 8))
    """

    def route(site: str, x: Tensor) -> Tensor:
        size = x.shape[-1:]
        v = F.layer_norm(gates[site].to(x), size)
        return top_k(F.layer_norm(x, size) @ v.mT / size[0] ** 0.5, min(k, len(v)))

    return route


def sigmoid_gate(vectors: Mapping[str, Tensor]) -> Route:
    """Return the gate that PHATGOOSE trains for one expert: σ(v·x) at each site and token.

    Args:
        vectors: {site: [in]}, trained; start at zero.

    Returns:
        A function (site, x) ↦ gates [..., 1], for `net.gated` with a stack of the one expert.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        expert, x = pf.stack([net.init()]), torch.randn(3, 8)
        loss = lambda v: net.gated(expert, pf.routing.sigmoid_gate(v), x).square().mean()
        g = torch.func.grad(loss)({"0.weight": torch.zeros(8)})
    """
    return lambda site, x: torch.sigmoid(x @ vectors[site].to(x))[..., None]


def xlora(
    net: Adapted,
    classifier: Callable[[Tensor], Tensor],
    *,
    layerwise: bool = False,
    k: int | None = None,
    softmax: bool = True,
    softmax_top_k: bool = False,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> PerForward:
    """Return the gates of X-LoRA: a classifier of the base's last hidden states weighs the experts, for each token.

    Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", 2024, arXiv:2402.07148. Each forward pass runs
    the base once without gradients, and then the experts with what the classifier makes of it; in `generate`, once for
    every step, with `use_cache=False` as PEFT has it.

    Args:
        net: the net of the experts.
        classifier: hidden states [rows, tokens, d] ↦ scores [rows, tokens, experts], or [rows, tokens, sites·experts]
            with layerwise. A closure over parameters that train: `net.gated` is differentiable in them.
        layerwise: each site has scores of its own, in the order of `net.plan`.
        k: only the k largest gates stay.
        softmax: take the softmax of scores/temperature over experts first.
        softmax_top_k: normalise what stays by another softmax.
        temperature: of the first softmax.
        weight: PEFT's global_scaling_weight, a factor of all gates.

    Returns:
        Gates for `net.gated`.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, vocab_size=32))
        net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2)})
        many, head = pf.stack([net.init(seed=0), net.init(seed=1)]), torch.nn.Linear(16, 2)
        logits = net.gated(many, pf.routing.xlora(net, head), input_ids=torch.tensor([[1, 2, 3]])).logits
    """
    sites = list(net.plan)

    def final(scores: Tensor) -> Tensor:
        g = torch.softmax(scores / temperature, -1) if softmax else scores
        if k is not None:
            largest, at = g.topk(k, -1)
            g = torch.zeros_like(g).scatter(-1, at, torch.softmax(largest, -1) if softmax_top_k else largest)
        elif softmax_top_k:
            g = torch.softmax(g, -1)
        return weight * g

    def gates(*args: Any, **kwargs: Any) -> Any:
        asked = {**kwargs, "output_hidden_states": True, "labels": None}
        with torch.no_grad():
            states = net.model(*args, **{n: v for n, v in asked.items() if v is not None}).hidden_states[-1]
        scores = classifier(states)
        if not layerwise:
            return final(scores)
        each = final(scores.unflatten(-1, (len(sites), -1))).unbind(-2)
        return {rf"^{site}$".replace(".", r"\."): g for site, g in zip(sites, each, strict=True)}

    return PerForward(gates)


class Routed:
    """A mixture whose router trains with its experts: a function of one tree, {"experts": stack, "router": …}.

    Args:
        net: the net of the experts.
        experts: how many.
        router: (the router's parameters, site, the site's input) ↦ gates [rows, …, experts].
        init: seed ↦ the router's parameters, any tree of tensors.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        mixture = pf.Routed(net, 3, lambda w, site, x: torch.softmax(x @ w[site].mT, -1),
            lambda seed: {"0.weight": torch.zeros(3, 8)})
        a = mixture.init(seed=0)
        g = torch.func.grad(lambda a: mixture.apply(a, torch.randn(5, 8)).square().mean())(a)
    """

    def __init__(
        self, net: Adapted, experts: int, router: Callable[[Any, str, Tensor], Tensor], init: Callable[[int], Any]
    ):
        if experts < 1:
            raise ValueError(f"Routed: experts is {experts}; give at least 1")
        self.net, self.experts, self.router, self._init = net, experts, router, init

    def init(self, seed: int = 0) -> dict[str, Any]:
        """Return a fresh mixture.

        Args:
            seed: seed of the experts and of the router.

        Returns:
            {"experts": a stack of fresh adapters, "router": what the router's `init` returns}.
        """
        made = [self.net.init(seed=seed * self.experts + k) for k in range(self.experts)]
        return {"experts": stack(made), "router": self._init(seed)}

    def apply(self, adapter: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model with the mixture: `net.gated` with the router's gates at every site.

        Args:
            adapter: a tree like that of `init`.
            args, kwargs: as for `net.gated`.

        Returns:
            The model's output.

        Raises:
            KeyError: `adapter` is no tree of `init`.
        """
        self._check(adapter)
        return self.net.gated(adapter["experts"], self.gates(adapter["router"]), *args, **kwargs)

    def _check(self, adapter: Any) -> None:
        """KeyError unless `adapter` has what a tree of `init` has."""
        if not isinstance(adapter, Mapping) or adapter.keys() != {"experts", "router"}:
            has = sorted(adapter) if isinstance(adapter, Mapping) else type(adapter).__name__
            raise KeyError(f"Routed: the adapter has {has}; give a tree like that of init, with experts and router")

    def gates(self, router: Any) -> Route | PerForward:
        """Return the gates that a router's parameters make, for `net.gated`.

        Args:
            router: the router's parameters.

        Returns:
            Gates.
        """
        return lambda site, x: self.router(router, site, x)
