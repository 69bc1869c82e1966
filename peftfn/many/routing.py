"""Gates: functions that say how much each expert of a stack acts. Arrow is in `arrow.py`, mixtures in `routed.py`."""

import inspect
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.numbers import checks_numbers
from peftfn.net.net import Adapted, check_net
from peftfn.slots.routes import PerForward

Route = Callable[[str, Tensor], Tensor]
"""(site, its input [rows, …, in]) ↦ gates [rows, …, experts]"""


@checks_numbers
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
    if not 1 <= k <= scores.shape[-1] or not temperature > 0:
        raise ValueError(
            f"top_k: k={k} and temperature={temperature}; give k in [1, {scores.shape[-1]}] and a temperature above 0"
        )
    largest, at = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, at, torch.softmax(largest / temperature, -1))


@checks_numbers
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

    Raises:
        ValueError: k is below 1; in the call, a site without vectors, or of another shape; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack([net.init(seed=0), net.init(seed=1)])
        y = net.gated(many, pf.routing.phatgoose({"0.weight": torch.randn(2, 8)}, k=1), torch.randn(3, 8))
    """

    if k < 1:
        raise ValueError(f"phatgoose: k is {k}; give k >= 1")

    def route(site: str, x: Tensor) -> Tensor:
        size = x.shape[-1:]
        v = F.layer_norm(of_site("phatgoose", gates, site, x, 2).to(x), size)
        return top_k(F.layer_norm(x, size) @ v.mT / size[0] ** 0.5, min(k, len(v)))

    return route


def sigmoid_gate(vectors: Mapping[str, Tensor]) -> Route:
    """Return the gate that PHATGOOSE trains for one expert: σ(v·x) at each site and token.

    Args:
        vectors: {site: [in]}, trained; start at zero.

    Returns:
        A function (site, x) ↦ gates [..., 1], for `net.gated` with a stack of the one expert.

    Raises:
        ValueError: in the call, a site without a vector, or of another shape; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        expert, x = pf.stack([net.init()]), torch.randn(3, 8)
        loss = lambda v: net.gated(expert, pf.routing.sigmoid_gate(v), x).square().mean()
        g = torch.func.grad(loss)({"0.weight": torch.zeros(8)})
    """
    return lambda site, x: torch.sigmoid(x @ of_site("sigmoid_gate", vectors, site, x, 1).to(x))[..., None]


def of_site(where: str, vectors: Mapping[str, Tensor], site: str, x: Tensor, dims: int) -> Tensor:
    """The vectors of a site, [in] or [experts, in]. ValueError if it has none, or they are of another shape."""
    v = vectors.get(site)
    want = f"[{x.shape[-1]}]" if dims == 1 else f"[experts, {x.shape[-1]}]"
    if v is None:
        raise ValueError(
            f"{where}: {site} has no vectors, and {', '.join(list(vectors)[:3]) or 'nothing'} has; give {want} for "
            "every site of the net"
        )
    if v.dim() != dims or v.shape[-1] != x.shape[-1]:
        raise ValueError(f"{where}: {site}: the vectors are {list(v.shape)}, and its input wants {want}")
    return v


@checks_numbers
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

    Raises:
        ValueError: k or temperature is out of range, or the model returns no hidden states.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, vocab_size=32))
        net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2)})
        many, head = pf.stack([net.init(seed=0), net.init(seed=1)]), torch.nn.Linear(16, 2)
        logits = net.gated(many, pf.routing.xlora(net, head), input_ids=torch.tensor([[1, 2, 3]])).logits
    """
    check_net("xlora", net)
    sites = list(net.plan)
    if (k is not None and k < 1) or not temperature > 0:
        raise ValueError(f"xlora: k={k} and temperature={temperature}; give k >= 1 and a temperature above 0")
    if not isfinite(weight):
        raise ValueError(f"xlora: weight is {weight}; give a finite number")
    taken = inspect.signature(net.model.forward).parameters
    if "output_hidden_states" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            f"xlora: {type(net.model).__name__} takes no output_hidden_states, and its classifier reads them: give a "
            "model of transformers, or gates of your own in peftfn.PerForward"
        )

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
