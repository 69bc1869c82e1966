"""A mixed batch called again and again: what is kept of it is what the caller's stacks and the base are now."""

import gc
import sys
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from models import by_name, tokens
from optree import tree_map
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.slots.kept_mixed import KeptMixed
from peftfn.testing import shaken

RULES = {
    "low-rank": {"[qkv]_proj|mlp": pf.LoRA(2)},
    "with a gain": {"[qk]_proj": pf.DoRA(2)},
    "beside others": {"q_proj": pf.LoRA(2), "v_proj": pf.OFT(block_size=2), "norm": pf.Full()},
}
ROWS = {"sorted": [0, 1, 2], "in pairs": [0, 0, 1, 1, 2, 2], "some": [2, 0], "anyhow": [2, -1, 0, 2], "one": [1, 1]}


def made(rules: Any, prepared: bool = False) -> tuple[nn.Module, pf.Adapted, list[Any], Any]:
    model = by_name["llama"].build().eval()
    net = pf.adapt(model, rules)
    each = [shaken(net.init(i), i) for i in range(3)]
    return model, net, each, pf.stack([net.prepare(a) if prepared else a for a in each])


def alone(net: pf.Adapted, each: list[Any], index: list[int], x: Tensor) -> Tensor:
    """Row by row, on another net of the same rules, which has kept nothing."""
    other = pf.adapt(net.model, {n: e.method for n, e in net.plan.items()})
    plain: Any = net.model
    with torch.no_grad():
        return torch.cat(
            [(plain(x[i : i + 1]) if k < 0 else other.apply(each[k], x[i : i + 1])).logits for i, k in enumerate(index)]
        )


def warm(net: pf.Adapted, stack: Any, times: int = 3) -> None:
    with torch.no_grad():
        for index in ([1, 0], [1, 1]):  # all rows of one adapter are `apply`, of views of the stack
            for _ in range(times):
                net.mixed(stack, index, tokens(2))


def is_kept(net: pf.Adapted) -> bool:
    (skeleton,) = net._runner._idle
    return bool(skeleton.mixed_keeper.values)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", RULES)
def test_other_rows_each_time(name: str, mode: Any) -> None:
    _, net, each, stack = made(RULES[name], prepared=name == "with a gain")
    with mode():
        for _ in range(2):
            for index in ROWS.values():
                x = tokens(len(index))
                got = net.mixed(stack, index, x).logits
                torch.testing.assert_close(got, alone(net, each, index, x), rtol=1e-4, atol=1e-5)
    assert is_kept(net)


def test_an_index_of_tokens() -> None:
    """As a manager of continuous batching has it: other tokens of other adapters in each call."""
    _, net, each, stack = made(RULES["low-rank"])
    x = tokens(2)
    rows, length = x.shape
    with torch.no_grad():
        for turn in range(6):
            g = torch.Generator().manual_seed(turn)
            one = torch.randint(-1, 3, (rows, 1), generator=g).expand(rows, length) if turn % 2 else None
            index = torch.randint(-1, 3, (rows, length), generator=g) if one is None else one
            got = net.mixed(stack, index, x).logits
            other = pf.adapt(net.model, RULES["low-rank"])
            torch.testing.assert_close(got, other.mixed(pf.stack(each), index, x).logits, rtol=1e-4, atol=1e-5)
            if one is not None:
                torch.testing.assert_close(got, alone(net, each, one[:, 0].tolist(), x), rtol=1e-4, atol=1e-5)
    assert is_kept(net)


def test_the_layers_own_bias_is_as_it_is_now() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False)).eval()
    net = pf.adapt(model, {"weight": pf.LoRA(2)})
    each = [shaken(net.init(i), i) for i in range(2)]
    stack, x = pf.stack(each), torch.randn(4, 5, 4)
    with torch.no_grad():
        for i in range(4):
            model[0].bias.fill_(i)
            want = torch.stack([net.apply(each[k], x[j]) for j, k in enumerate([0, 0, 1, 1])])
            torch.testing.assert_close(net.mixed(stack, [0, 0, 1, 1], x), want)


def changes(model: Any, stack: Any) -> dict[str, Any]:
    site = next(iter(stack))
    w = model.get_parameter(site)

    def other_data() -> None:
        stack[site]["b"].data = torch.randn_like(stack[site]["b"])

    def other_tensor() -> None:
        stack[site]["b"] = torch.randn_like(stack[site]["b"])

    def base_data() -> None:
        w.data = w.data + 1

    return {
        "written in place": lambda: stack[site]["b"].add_(1),
        "other .data": other_data,
        "another tensor": other_tensor,
        "the base in place": lambda: w.add_(1),
        "the base's .data": base_data,
    }


@pytest.mark.parametrize("what", changes(made(RULES["low-rank"])[0], made(RULES["low-rank"])[3]))
@pytest.mark.parametrize("rows", ROWS)
def test_a_change_is_seen_by_the_next_call(what: str, rows: str) -> None:
    model, net, _, stack = made(RULES["low-rank"])
    warm(net, stack)
    assert is_kept(net)
    with torch.no_grad():
        changes(model, stack)[what]()
        each = [tree_map(lambda t, k=k: t[k], stack) for k in range(3)]  # type: ignore[misc]
        x, index = tokens(len(ROWS[rows])), ROWS[rows]
        got = net.mixed(stack, index, x).logits
        torch.testing.assert_close(got, alone(net, each, index, x), rtol=1e-4, atol=1e-5)


def test_gradients_after_calls_without() -> None:
    _, net, each, stack = made(RULES["low-rank"])
    warm(net, stack)
    given = tree_map(Tensor.requires_grad_, stack)
    net.mixed(given, [2, 0], tokens(2)).logits.square().sum().backward()
    tracked = [tree_map(lambda t: t.clone().requires_grad_(), a) for a in each]
    sum(net.apply(tracked[k], tokens(2)[i : i + 1]).logits.square().sum() for i, k in enumerate([2, 0])).backward()
    for site, leaf in given.items():
        for k, t in leaf.items():
            for i, a in enumerate(tracked):
                want = torch.zeros_like(a[site][k]) if a[site][k].grad is None else a[site][k].grad
                torch.testing.assert_close(t.grad[i], want, rtol=1e-3, atol=1e-4)


class TurnsGradientsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.layer(x)  # type: ignore[no-any-return]


def test_a_forward_that_turns_gradients_on() -> None:
    net = pf.adapt(TurnsGradientsOn().eval(), {"weight": pf.LoRA(2)})
    stack = tree_map(Tensor.requires_grad_, pf.stack([shaken(net.init(i), i) for i in range(2)]))
    x = torch.randn(2, 3, 4)
    for _ in range(4):
        with torch.no_grad():
            y = net.mixed(stack, [1, 0], x)
        g = torch.autograd.grad(y.square().sum(), [stack["layer.weight"]["b"]])[0]
        assert g[0].any() and g[1].any()


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, MappingProxyType])
def test_leaves_may_be_any_mappings(kind: Any) -> None:
    """What is kept of one adapter must not serve another, whatever holds its tensors."""
    net = pf.adapt(nn.Sequential(nn.Linear(4, 4)).eval(), {"weight": pf.LoRA(2)})
    some = [shaken(net.init(i), i) for i in range(3)]
    one, two, three = ({n: kind(leaf) for n, leaf in a.items()} for a in some)
    stacks = [pf.stack(some), pf.stack(some[::-1])]
    first, second = ({n: kind(leaf) for n, leaf in s.items()} for s in stacks)
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        for _ in range(4):
            net.apply(one, x)
            net.mixed(first, [0, 1, 2], x)
        for given, plain in ((two, some[1]), (three, some[2]), (one, some[0])):
            torch.testing.assert_close(net.apply(given, x), net.apply(plain, x))
        for given, plain in ((second, stacks[1]), (first, stacks[0])):
            torch.testing.assert_close(net.mixed(given, [0, 0, 1], x), net.mixed(plain, [0, 0, 1], x))


def test_nothing_keeps_the_stack_alive() -> None:
    _, net, _, stack = made(RULES["low-rank"])
    warm(net, stack)
    assert is_kept(net)
    assert net._runner._idle[0].keeper.values  # of all rows of one adapter
    gone = [weakref.ref(t) for leaf in stack.values() for t in leaf.values()]
    del stack
    gc.collect()
    assert not any(r() is not None for r in gone)
    (skeleton,) = net._runner._idle
    assert not skeleton.keeper.values
    assert not is_kept(net)


def test_merged_params_and_several_nets() -> None:
    model, net, each, stack = made(RULES["low-rank"])
    warm(net, stack)
    other = pf.adapt(model, {"mlp": pf.IA3()})
    mine = shaken(other.init(), 7)
    nets, stacks, x = pf.Nets([net, other]), [stack, pf.stack([mine])], tokens(3)
    want = torch.cat([functional_call(model, net.merge(each[2]), (x[:1],)).logits, other.apply(mine, x[1:2]).logits])
    with torch.no_grad():
        for _ in range(4):
            got = nets.mixed(stacks, [2, 3, -1], x).logits
            torch.testing.assert_close(got[:2], want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got[2:], model(x[2:]).logits)
        own = {n: p.detach() + 1 for n, p in model.named_parameters() if "lm_head" in n}
        torch.testing.assert_close(
            net.mixed(stack, [2], x[:1], params=own).logits, net.apply(each[2], x[:1], params=own).logits
        )


def test_a_bank_that_fetches_others_meanwhile() -> None:
    _, net, _, _ = made(RULES["low-rank"])
    adapters = [shaken(net.init(i), i) for i in range(6)]
    bank = pf.Bank([net], capacity=2)
    for i, a in enumerate(adapters):
        bank.put(str(i), net, a)
    x = tokens(2)
    with torch.no_grad():
        for names in ([0, 1], [1, 0], [2, 3], [3, 2], [0, 5], [5, 5], [4, 0]):
            got = bank.apply([str(k) for k in names], x).logits
            torch.testing.assert_close(got, alone(net, adapters, names, x), rtol=1e-4, atol=1e-5)


def fifty_layers() -> tuple[pf.Adapted, Any, Tensor]:
    net = pf.adapt(nn.Sequential(*(nn.Linear(8, 8) for _ in range(50))), {"weight": pf.LoRA(2)})
    return net, pf.stack([net.init(i) for i in range(3)]), torch.randn(3, 2, 8)


def calls_of(f: Callable[[], Any]) -> int:
    """Functions written in Python that the fifth call runs."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with torch.no_grad():
        for _ in range(4):
            f()
        sys.setprofile(count)
        try:
            f()
        finally:
            sys.setprofile(None)
    return calls


def test_python_calls_a_site() -> None:
    net, stack, x = fifty_layers()
    calls = calls_of(lambda: net.mixed(stack, [0, 1, 2], x))
    assert isinstance(next(iter(net._runner._idle[0].mixed_keeper.values.values())), KeptMixed)
    assert calls / 50 <= 14, calls / 50


def test_all_rows_of_one_adapter_cost_what_apply_costs() -> None:
    net, stack, x = fifty_layers()
    alone = net.init(1)
    assert (
        calls_of(lambda: net.mixed(stack, [1, 1, 1], x)) <= calls_of(lambda: net.apply(alone, x)) + 120
    )  # a call, not a site
