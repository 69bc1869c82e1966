"""What the owner does to the base between two calls is seen by the next one or is a clear error."""

import copy
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import by_name, noise, tokens
from support import Net, call, close, random, state
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf
from peftfn import IA3, DoRA, Full, LoRA


def body(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(m.norm(m.f(x)), m.p, training=m.training)
    y = y if m.shift is None else y + m.shift
    for i in m.layers:
        y = m.blocks[i](y)
    return y * m.table["scale"] * m.held + m.drop(y) + m.hidden[0](y)


def fresh() -> nn.Module:
    parts = {"norm": nn.BatchNorm1d(8), "drop": nn.Dropout(0.0), "p": 0.0, "layers": [0, 1], "table": {"scale": 1.0}}
    model = Net(body, **parts, held=torch.ones(8), blocks=nn.ModuleList([nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]))
    model.register_buffer("shift", None)
    model.register_buffer("extra", torch.ones(8))
    model.hidden = [nn.Linear(8, 8)]  # a module its owner keeps from the parameters
    model.norm.running_mean.copy_(noise(8))
    model.drop.register_forward_hook(lambda m, x, y: 2 * y)
    return model.eval()


def step(m: Any) -> None:
    m.f(noise(3, 8)).square().sum().backward()
    torch.optim.AdamW(m.parameters(), lr=0.1).step()
    m.zero_grad()


def replaced_slot(m: Any) -> None:
    m.f.weight = nn.Parameter(noise(8, 8, seed=5))


def replaced_other(m: Any) -> None:
    m.blocks[0].weight = nn.Parameter(noise(8, 8, seed=5))


def appended(m: Any) -> None:
    m.blocks.append(nn.Linear(8, 8))
    m.layers = [0, 1, 2, 3]


def through_data(m: Any) -> None:
    m.f.weight.data.mul_(2)
    m.norm.running_mean.data.add_(2)


def hook(m: Any) -> None:
    m.f.register_forward_hook(lambda m, x, y: 3 * y)
    m.f.register_forward_pre_hook(lambda m, x, kw: ((x[0] + 1,), kw), with_kwargs=True)


def renamed_buffer(m: Any) -> None:
    del m.extra
    m.register_buffer("other", torch.ones(8))


def weight_normed(m: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(m.blocks[0])
    with torch.no_grad():
        m.blocks[0].parametrizations.weight.original0.mul_(3)


def patched(m: Any) -> None:
    m.blocks[0].forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight), m.blocks[0])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": step,
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v + 1 for k, v in m.state_dict().items()}),
    "to(float64)": lambda m: (setattr(m, "hidden", [nn.Linear(8, 8).double()]), m.double()),
    "dropout.p": lambda m: (m.train(), setattr(m.norm, "training", False), setattr(m.drop, "p", 0.9)),
    "a float": lambda m: (m.train(), setattr(m.norm, "training", False), setattr(m, "p", 0.9)),
    "train": lambda m: m.train(),
    "a list": lambda m: setattr(m, "layers", [0, 1, 2]),
    "a list in place": lambda m: m.layers.append(2),
    "a dict in place": lambda m: m.table.update(scale=3.0),
    "a list emptied": lambda m: m.layers.clear(),
    "a buffer in place": lambda m: m.norm.running_mean.add_(2),
    "a buffer and a weight through .data": through_data,
    "a buffer filled": lambda m: setattr(m, "shift", noise(8, seed=7)),
    "a buffer renamed": renamed_buffer,
    "a new buffer": lambda m: m.register_buffer("new", torch.ones(2)),
    "a plain tensor": lambda m: setattr(m, "held", noise(8, seed=8)),
    "a plain tensor in place": lambda m: m.held.mul_(2),
    "an adapted parameter": replaced_slot,
    "another parameter": replaced_other,
    "a parameter taken away": lambda m: setattr(m.blocks[0], "bias", None),
    "the adapted layer's bias taken away": lambda m: setattr(m.f, "bias", None),
    "a submodule": lambda m: setattr(m, "norm", nn.LayerNorm(8)),
    "the adapted submodule": lambda m: setattr(m, "f", nn.Linear(8, 8)),
    "a submodule of a list": lambda m: m.blocks.__setitem__(1, nn.ReLU()),
    "a layer appended": appended,
    "hooks": hook,
    "hooks taken off": lambda m: m.drop._forward_hooks.clear(),
    "hooks replaced": lambda m: setattr(m.drop, "_forward_hooks", {0: lambda m, x, y: 5 * y}),
    "a parametrization": weight_normed,
    "a forward on the instance": patched,
    "the forward function": lambda m: setattr(m, "body", lambda m, x: m.f(x)),
    "a hidden module in place": lambda m: m.hidden[0].weight.data.mul_(3),
    "requires_grad": lambda m: m.requires_grad_(False),
}


def outcome(run: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return run()


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_sees(change: str) -> None:
    model = fresh()
    net = pf.adapt(model, {r"^f\.weight|^f\.bias": Full(), "blocks.2": LoRA(2)})
    a, x = random(net), noise(4, 8)
    net.apply(a, x)
    old = net.apply(a, x).detach()
    torch.manual_seed(9)
    CHANGES[change](model)
    x = x.double() if change == "to(float64)" else x
    before = state(model)
    if change == "the adapted layer's bias taken away":
        with pytest.raises((ValueError, KeyError), match=r"f\.bias"):
            net.apply(a, x)
        return
    got = outcome(lambda: net.apply(a, x))
    new = pf.adapt(model, net.plan.rules)  # what a net made now gives, on a model it has never seen before
    want = outcome(lambda: new.apply(a, x))
    close(got.detach(), want.detach())
    if change == "to(float64)":
        assert got.dtype == torch.float64
    elif change not in ("a new buffer", "a buffer renamed", "requires_grad"):
        assert old.shape != got.shape or (old - got).abs().max() > 1e-4
    plain = copy.deepcopy(model)
    merged = outcome(lambda: call(plain, net.merge(a), (x,), {}))
    close(got.detach(), merged.detach())
    [close(now[4], then[4]) for now, then in zip(state(model), before, strict=True) if isinstance(now[4], Tensor)]


def test_a_change_and_its_reverse() -> None:
    model, x = fresh(), noise(4, 8)
    net = pf.adapt(model, {"f": LoRA(2)})
    a, f = random(net), model.f
    want = net.apply(a, x)
    model.f = nn.Identity()
    with pytest.raises((ValueError, KeyError), match=r"f\.weight.*adapt") as error:
        net.apply(a, x)
    assert not isinstance(error.value, KeyError) or len(str(error.value)) > 30
    model.f = f
    assert torch.equal(net.apply(a, x), want), "a skeleton that failed to follow the base was kept"


def test_another_shape_is_an_error_until_it_is_undone() -> None:
    model, x = fresh(), noise(4, 8)
    net = pf.adapt(model, {"f": LoRA(2)})
    a, f = random(net), model.f
    want = net.apply(a, x)
    model.f = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"f\.weight.*\[4, 8\].*\[8, 8\].*adapt"):
        net.apply(a, x)
    with pytest.raises(ValueError, match=r"f\.weight"):
        net.merge(a)
    model.f = f
    assert torch.equal(net.apply(a, x), want)


def test_a_changed_config() -> None:
    model = by_name["bert"].build()
    net = pf.adapt(model, {"query": LoRA(2)})
    a, ids = random(net), tokens(2)
    assert net.apply(a, ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(net.apply(a, ids).hidden_states) == 3
    model.config = copy.deepcopy(model.config)
    model.config.output_hidden_states = False
    assert net.apply(a, ids).hidden_states is None


def test_max_norm_set_later_does_not_renormalise_the_base() -> None:
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    net = pf.adapt(model, {"1": LoRA(2)})
    a, ids = random(net), torch.tensor([[1, 2]])
    net.apply(a, ids)
    model[0].max_norm = 0.5
    before = model[0].weight.detach().clone()
    got = net.apply(a, ids)
    assert torch.equal(model[0].weight, before)
    close(got, F.linear(F.embedding(ids, before.clone(), max_norm=0.5), net.merge(a)["1.weight"], model[1].bias))


def test_train_and_eval_switch_the_adapters_dropout() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"0": LoRA(2, dropout=0.5)})
    a, x = random(net), noise(64, 8)
    still = net.apply(a, x)
    close(still, call(model, net.merge(a), (x,), {}))
    model.train()
    torch.manual_seed(0)
    dropped = net.apply(a, x)
    assert (dropped - still).abs().max() > 1e-3
    model.eval()
    assert torch.equal(net.apply(a, x), still)


# A copy of the model's structure must not lead back to the model itself.


def closure(m: Any) -> None:
    m.run = lambda x: m.f(x)
    m.body = lambda s, x: s.run(x)


def wrapped(m: Any) -> None:
    old = m.forward
    m.forward = lambda *args, **kwargs: 2 * old(*args, **kwargs)


def in_list(m: Any) -> None:
    m.refs, m.body = [m.f], lambda s, x: s.refs[0](x)


def parameter_in_list(m: Any) -> None:
    m.refs, m.body = [m.g.weight], lambda s, x: F.linear(s.f(x), s.refs[0])


def bound(m: Any) -> None:
    m.run, m.body = m.f.forward, lambda s, x: s.run(x)


@pytest.mark.parametrize("way", [closure, wrapped, in_list, parameter_in_list, bound], ids=lambda f: f.__name__)
def test_a_second_way_to_a_module_is_followed_or_refused(way: Callable[[Any], None]) -> None:
    model, x = Net(lambda m, x: m.f(x)), noise(3, 8)
    way(model)
    try:
        net = pf.adapt(model, {"f": LoRA(2)})
    except (TypeError, ValueError) as e:
        assert way.__name__ in ("closure", "wrapped"), e
        return
    a = random(net)
    plain = F.linear(x, net.merge(a)["f.weight"], model.f.bias)
    want = {"wrapped": 2 * plain, "parameter_in_list": F.linear(plain, model.g.weight)}.get(way.__name__, plain)
    leaf = {n: {k: t.requires_grad_() for k, t in p.items()} for n, p in a.items()}
    got = net.apply(leaf, x)
    close(got, want)
    got.sum().backward()
    assert all(p.grad is None for p in model.parameters()), "a gradient accumulated on the base"


def test_ia3_and_dora_follow_the_base_too() -> None:
    for method in (IA3(), DoRA(2)):
        model, x = fresh(), noise(4, 8)
        net = pf.adapt(model, {"f": method})
        a = random(net)
        net.apply(a, x)
        step(model)
        close(net.apply(a, x), call(model, net.merge(a), (x,), {}))


class _Holding(nn.Module):
    """A layer, and beside it a list with a tensor, an object with a number, and integers that are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.tensors, self.settings = [torch.ones(4)], SimpleNamespace(factor=2.0)
        self.register_buffer("places", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.places]) * self.tensors[0] * self.settings.factor


@pytest.mark.parametrize("change", ["a tensor in a list", "an attribute of an object"])
def test_what_a_module_holds_is_seen_as_it_is(change: str) -> None:
    model, x = _Holding(), torch.randn(2, 4)
    net = pf.adapt(model, {"layer": pf.LoRA(2)})
    before = net.apply(net.init(), x)
    if change == "a tensor in a list":
        model.tensors[0].mul_(3)
    else:
        model.settings.factor = 6.0
    torch.testing.assert_close(net.apply(net.init(), x), 3 * before)
    torch.testing.assert_close(net.apply(net.init(), x), model(x))


def test_a_call_in_inference_mode_leaves_nothing_that_cannot_be_trained() -> None:
    net, x = pf.adapt(_Holding(), {"layer": pf.LoRA(2)}), torch.randn(2, 4)
    with torch.inference_mode():
        net.apply(net.init(), x)
        net.model.settings.factor = 3.0  # so that the next call copies the structure anew, in inference mode
        net.apply(net.init(), x)
    a = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in net.init().items()}
    net.apply(a, x).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in a["layer.weight"].values())


def test_an_adapted_parameter_read_from_a_list_is_an_error() -> None:
    model, x = _Holding(), torch.randn(2, 4)
    model.tensors.append(model.layer.weight)
    model.forward = types.MethodType(lambda self, x: self.layer(x) + x @ self.tensors[1].mT, model)
    net = pf.adapt(model, {"layer": pf.LoRA(2)})
    with pytest.raises(RuntimeError, match=r"layer\.weight: the model reads this parameter from a list"):
        net.apply(net.init(), x)
