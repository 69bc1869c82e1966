"""Rematerialised layers in a net: values and gradients are those without, under every transform, in less memory."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf
from benchmarks.memory import peak
from peftfn.net.skeleton import Skeleton

RULES = {
    r"[qv]_proj": pf.LoRA(rank=2, dropout=0.2),
    "o_proj": pf.DoRA(rank=2),
    "norm": pf.Full(),
    "down_proj": pf.IA3(),
}
IDS = torch.arange(21).view(3, 7)
MASK = (torch.arange(7) < torch.tensor([[7], [5], [6]])).long()


@cache
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model, and the same with gradient checkpointing."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        attn_implementation="eager",
        attention_dropout=0.1,
    )
    torch.manual_seed(0)
    plain, other = LlamaForCausalLM(config).double().train(), LlamaForCausalLM(config).double().train()
    other.load_state_dict(plain.state_dict())
    other.gradient_checkpointing_enable()
    return plain, other


@cache
def nets() -> dict[str, pf.Adapted]:
    plain, other = models()
    net = pf.adapt(plain, RULES)
    return {"plain": net, "checkpointed": net.checkpointed("layers"), "the model's own": pf.adapt(other, RULES)}


@cache
def adapter(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    noise = lambda t: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype)  # noqa: E731
    return tree_map(noise, nets()["plain"].init(seed, dtype=torch.double))


def loss(net: pf.Adapted, a: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    return net.apply(a, input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]


def batch(net: pf.Adapted, kind: str, stacked: Any, gates: Any) -> Tensor:
    run = net.mixed if kind == "mixed" else net.gated
    out: Tensor = run(stacked, gates, input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
    return out


def backward(net: pf.Adapted) -> Any:
    p = tree_map(lambda t: t.clone().requires_grad_(), adapter(0))
    loss(net, p).backward()  # type: ignore[no-untyped-call]
    return tree_map(lambda t: t.grad, p)


def of_base(net: pf.Adapted) -> Any:
    params = {n: p.detach() for n, p in net.model.named_parameters() if "gate_proj" in n}
    return grad(lambda params: net.apply(adapter(0), input_ids=IDS, params=params, use_cache=False).logits.sum())(
        params
    )


def stacked() -> Any:
    return pf.stack([adapter(0), adapter(1)])


GATES = torch.tensor([[0.3, 0.7], [0.1, 0.2], [1.0, 0.0]], dtype=torch.double)
WAYS: dict[str, Callable[[pf.Adapted], Any]] = {
    "value": lambda net: loss(net, adapter(0)),
    "grad": lambda net: grad(lambda a: loss(net, a))(adapter(0)),
    "backward": backward,
    "grad of the base": of_base,
    "vmap(grad)": lambda net: vmap(grad(lambda a: loss(net, a)), randomness="different")(stacked()),
    "per sample": lambda net: vmap(
        lambda ids, mask: grad(lambda a: loss(net, a, ids, mask))(adapter(0)), randomness="different"
    )(IDS[:, None], MASK[:, None]),
    "jvp": lambda net: jvp(lambda a: loss(net, a), (adapter(0),), (adapter(1),))[1],
    "Hessian-vector product": lambda net: jvp(grad(lambda a: loss(net, a)), (adapter(0),), (adapter(1),))[1],
    "mixed": lambda net: grad(lambda s: batch(net, "mixed", s, [1, -1, 0]))(stacked()),
    "gated": lambda net: grad(lambda g: batch(net, "gated", stacked(), g))(GATES),
    "a sum": lambda net: grad(lambda a: loss(net, pf.add(pf.scale(a, 0.5), adapter(1))))(adapter(0)),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kind", ["checkpointed", "the model's own"])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_without(way: str, kind: str) -> None:
    adapter(0), adapter(1)  # made here, outside of every transform
    results: list[Any] = []
    for name in ("plain", kind):
        torch.manual_seed(7)
        results.append(tree_leaves(WAYS[way](nets()[name])))
    assert len(results[0]) == len(results[1]) > 0
    for want, got in zip(*results, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)  # Llama's norms and rotations are in fp32
    assert max(float(t.abs().max()) for t in results[0]) > 0


def test_a_second_call_before_the_backward_pass_does_not_change_it() -> None:
    """The recomputation has the tensors of its own call, whatever the skeleton did since."""
    net = nets()["checkpointed"]
    a, b = adapter(0), adapter(1)

    def both(a: Any) -> Tensor:
        first = loss(net, a)
        loss(net, b)
        return first

    torch.manual_seed(7)
    got = grad(both)(a)
    torch.manual_seed(7)
    want = grad(lambda a: loss(nets()["plain"], a))(a)
    for x, y in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def small() -> tuple[nn.Module, pf.Adapted, Any]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())]) for _ in range(8)]
    model = nn.Sequential(*blocks)
    net = pf.adapt(model, {r"weight": pf.LoRA(rank=2)})
    return model, net, net.init()


def test_threads_do_not_meet() -> None:
    _, net, _ = small()
    less = net.checkpointed(r"^\d$")
    x = torch.randn(4, 16)
    adapters = [tree_map(lambda t, i=i: t + 0.1 * i, net.init(i)) for i in range(6)]
    of = lambda net, a: grad(lambda a: net.apply(a, x).square().sum())(a)  # noqa: E731
    want = [of(net, a) for a in adapters]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda a: of(less, a), adapters * 3))
    for g, w in zip(got, want * 3, strict=True):
        for t, u in zip(tree_leaves(g), tree_leaves(w), strict=True):
            torch.testing.assert_close(t, u)


@pytest.mark.parametrize("many", [False, True])
def test_it_takes_less_memory(many: bool) -> None:
    _, net, a = small()
    x = torch.randn(256, 16)
    most = {}
    for name, n in (("less", net.checkpointed(r"^\d$")), ("all", net)):
        f = grad(lambda a, n=n: n.apply(a, x).square().sum())
        most[name] = peak(vmap(f), pf.stack([a, a, a])) if many else peak(f, a)
    assert most["all"] > 2.5 * most["less"], most


def test_the_base_keeps_its_forward_and_its_hooks() -> None:
    model, net, a = small()
    before = [(set(vars(m)), m.forward.__func__) for m in model.modules()]  # type: ignore[attr-defined]
    less = net.checkpointed(r"^\d$")
    grad(lambda a: less.apply(a, torch.ones(2, 16)).sum())(a)
    assert [(set(vars(m)), m.forward.__func__) for m in model.modules()] == before  # type: ignore[attr-defined]


def test_a_net_of_nets_and_a_pickled_one_keep_it() -> None:
    _, net, _ = small()
    less = net.checkpointed(r"^\d$")
    assert pickle.loads(pickle.dumps(less)).again == less.again == tuple(map(str, range(8)))
    assert pf.Nets([less, net])._runner.again == list(less.again)


def test_several_nets_have_the_gradients_of_nets_without() -> None:
    model, net, a = small()
    other = pf.adapt(model, {r"weight": pf.DoRA(rank=2)})
    stacks = [pf.stack([tree_map(lambda t: t + 0.1, a), a]), pf.stack([other.init(1)])]
    x = torch.randn(4, 16)

    def of(nets: pf.Nets) -> Any:
        return tree_leaves(grad(lambda s: nets.mixed(s, [1, -1, 2, 0], x).square().sum())(stacks))

    got, want = of(pf.Nets([net.checkpointed(r"^\d$"), other])), of(pf.Nets([net, other]))
    torch.testing.assert_close(got, want)
    assert all(t.isfinite().all() for t in want) and max(float(t.abs().max()) for t in want) > 0


def test_a_pattern_without_a_module_is_an_error() -> None:
    _, net, _ = small()
    with pytest.raises(ValueError, match="'blocks' matches no module that has parts, of 9"):
        net.checkpointed("blocks")


def test_a_call_looks_at_its_skeleton_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputation, in another thread, fills the slots of a skeleton that a call may have taken in the meantime."""
    real, owned = Skeleton.refresh, list[bool]()
    monkeypatch.setattr(Skeleton, "refresh", lambda self: (owned.append(self.lock._is_owned()), real(self))[1])
    _, net, a = small()
    net.apply(a, torch.ones(2, 16))
    assert owned == [True]
