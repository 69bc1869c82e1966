"""Gates: a weighted sum of adapters at every site."""

from typing import Any

import pytest
import torch
from models import by_name, tokens
from support import close, random, trees_close
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf
from peftfn import OFT, DoRA, Full, LoRA

RULES: dict[str, pf.Method] = {"q_proj": DoRA(2), "up_proj": OFT(4), "norm": Full(), "v_proj|embed_tokens": LoRA(2)}


def setting(k: int = 3, **rules: Any) -> tuple[Any, pf.Adapted, list[pf.Adapter], Tensor]:
    model = by_name["llama"].build()
    net = pf.adapt(model, rules or RULES)
    return model, net, [random(net, i) for i in range(k)], tokens(4)


def test_gates_of_one_and_none_are_adapters_and_the_base() -> None:
    model, net, many, x = setting()
    s = pf.stack(many)
    close(net.gated(s, [0.0, 0.0, 0.0], x).logits, model(x).logits)
    close(net.gated(s, [0.0, 1.0, 0.0], x).logits, net.apply(many[1], x).logits)
    rows = torch.eye(3)[[2, 0, 0, 1]]
    want = net.mixed(s, [2, 0, 0, 1], x).logits
    close(net.gated(s, rows, x).logits, want)
    close(net.gated(s, rows[:, None].expand(4, x.shape[1], 3), x).logits, want)
    close(vmap(lambda g: net.gated(s, g, x).logits)(rows[None])[0], want)  # nobody can look at these gates
    close(net.gated(s, rows.clone().requires_grad_(), x).logits, want)


def test_a_gate_scales_what_is_linear_in_the_change() -> None:
    """Of LoRA, gates are scales: [K] gates are the sum of the scaled adapters."""
    _, net, many, x = setting(2, **{"q_proj|v_proj|down_proj": LoRA(2)})
    want = net.apply(pf.add(pf.scale(many[0], 0.5), pf.scale(many[1], -1.5)), x).logits
    close(net.gated(pf.stack(many), [0.5, -1.5], x).logits, want)


def test_gates_of_tokens_only_touch_those_tokens() -> None:
    """Causal attention: what comes before the first token with a gate is the base's, bit for bit."""
    model, net, many, x = setting(2)
    g = torch.zeros(4, x.shape[1], 2)
    g[:, 3:, 0], g[1, 2:, 1] = 1.0, 0.3
    got, base = net.gated(pf.stack(many), g, x).logits, model(x).logits
    close(got[0, :3], base[0, :3], 1e-6)
    close(got[1, :2], base[1, :2], 1e-6)
    assert (got[:, 3:] - base[:, 3:]).abs().amax((1, 2)).min() > 1e-3


def test_gradients_of_gates_adapters_and_inputs() -> None:
    _, net, many, x = setting(2)
    s, g = pf.stack(many), torch.rand(4, x.shape[1], 2, generator=torch.Generator().manual_seed(0))
    embeds = net.model.get_input_embeddings()(x).detach()
    net = pf.adapt(net.model, {k: m for k, m in RULES.items() if "embed" not in k})
    s = {n: s[n] for n in net.plan}

    def loss(s: Any, g: Tensor, e: Tensor) -> Tensor:
        return net.gated(s, g, inputs_embeds=e).logits.square().mean()

    ds, dg, de = grad(loss, (0, 1, 2))(s, g, embeds)
    step, d = 1e-2, torch.randn(g.shape, generator=torch.Generator().manual_seed(1))
    numeric = (loss(s, g + step * d, embeds) - loss(s, g - step * d, embeds)) / (2 * step)
    assert abs((dg * d).sum() - numeric) < 2e-2 * abs(numeric)
    tracked = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in s.items()}
    gates, inputs = g.clone().requires_grad_(), embeds.clone().requires_grad_()
    loss(tracked, gates, inputs).backward()
    trees_close({n: {k: t.grad for k, t in leaf.items()} for n, leaf in tracked.items()}, ds, 1e-4)
    close(gates.grad, dg, 1e-4)
    close(inputs.grad, de, 1e-4)


def test_it_compiles() -> None:
    _, net, many, x = setting(2, **{"q_proj": LoRA(2)})
    s, g = pf.stack(many), torch.rand(4, 2)
    torch._dynamo.reset()
    run = torch.compile(lambda s, g, x: net.gated(s, g, x).logits, backend="eager")
    close(run(s, g, x), net.gated(s, g, x).logits)


BAD = [
    (torch.ones(2), r"\[2\].*2 adapters.*3"),
    (torch.ones(3, dtype=torch.long), r"int64.*floating"),
    (torch.tensor(1.0), r"\[\].*adapters"),
    (torch.ones(3, 3), r"\[3, 3\].*3 rows.*\[4, 5\]"),
    (torch.ones(4, 6, 3), r"6 tokens.*\[4, 5\]"),
    (torch.ones(4, 5, 1, 3), r"\[4, 5, 1, 3\]"),
]


@pytest.mark.parametrize(("gates", "match"), BAD, ids=[str(list(g.shape)) for g, _ in BAD])
def test_bad_gates(gates: Tensor, match: str) -> None:
    _, net, many, x = setting()
    with pytest.raises(ValueError, match=match):
        net.gated(pf.stack(many), gates, x)


def test_gates_of_tokens_need_a_site_with_tokens() -> None:
    case = by_name["vit"]
    net = pf.adapt(case.build(), {"classifier": LoRA(2)})
    (x,), _ = case.inputs(2)
    s = pf.stack([random(net, 1)])
    close(net.gated(s, torch.ones(2, 1), x).logits, net.apply(random(net, 1), x).logits)
    with pytest.raises(ValueError, match=r"classifier\.weight.*3 tokens.*\[rows, adapters\]"):
        net.gated(s, torch.full((2, 3, 1), 0.5), x)
