"""Methods around a module in calls: rows, gates, several nets, what they read of the model, and other modules."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from support import close, random, same_state, state
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import peftfn as pf
from peftfn.method import Leaf

INDEX = [2, -1, 0, 2, 1]
SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
IDS = torch.randint(3, 24, (5, 6), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=layers)).eval()


def everything(model: Any) -> pf.Adapted:
    """Weights and modules, one inside of the other."""
    rules: dict[str, pf.Method] = {
        "self_attn": pf.LlamaAdapter(n=3),
        r"[qkv]_proj": pf.LoRA(rank=2),
        "mlp": pf.Bottleneck(rank=3),
        "k_proj": pf.Bottleneck(rank=2),
        r"layers\.1": pf.Bottleneck(rank=2, of="input"),
        "norm": pf.Full(),
    }
    return pf.adapt(model, rules)


def logits(net: pf.Adapted, adapter: Any, rows: Any, **kwargs: Any) -> Tensor:
    """With an adapter, or without one."""
    out = net.model(IDS[rows], **kwargs) if adapter is None else net.apply(adapter, IDS[rows], **kwargs)
    y: Tensor = out.logits
    return y


def row_by_row(net: pf.Adapted, adapters: list[Any]) -> Tensor:
    """Each row alone, with its adapter of `INDEX`."""
    return torch.cat([logits(net, adapters[k] if k >= 0 else None, slice(i, i + 1)) for i, k in enumerate(INDEX)])


def test_rows_with_weights_and_modules_of_one_net() -> None:
    net = everything(llama())
    adapters = [random(net, i, scale=0.3) for i in range(3)]
    before, want, stack = state(net.model), row_by_row(net, adapters), pf.stack(adapters)
    assert not torch.allclose(want, net.model(IDS).logits, atol=1e-2)
    close(net.mixed(stack, INDEX, IDS).logits, want)
    hot = (torch.tensor(INDEX)[:, None] == torch.arange(3)).float()
    close(net.gated(stack, hot.requires_grad_(), IDS).logits, want)
    close(vmap(lambda a: net.apply(a, IDS).logits)(stack)[2], logits(net, adapters[2], slice(None)))
    slopes = grad(lambda s: net.mixed(s, INDEX, IDS).logits.square().sum())(stack)
    for k in range(3):
        mine = [i for i, j in enumerate(INDEX) if j == k]
        alone = grad(lambda a, rows=mine: logits(net, a, rows).square().sum())(adapters[k])  # type: ignore[misc]
        for name, leaf in alone.items():
            for key, g in leaf.items():
                close(slopes[name][key][k], g, 1e-3)
    assert same_state(before, state(net.model))


def test_generate_with_padding_is_each_row_alone() -> None:
    net = everything(llama())
    adapters, mask = [random(net, i, scale=0.3) for i in range(3)], torch.ones_like(IDS)
    mask[1, :2] = mask[3, :1] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        more = options | {"num_beams": beams}
        got = net.mixed(pf.stack(adapters), INDEX, IDS, attention_mask=mask, method="generate", **more)
        for i, k in enumerate(INDEX):
            row, at = more | {"attention_mask": mask[i : i + 1]}, IDS[i : i + 1]
            want = net.model.generate(at, **row) if k < 0 else net.apply(adapters[k], at, method="generate", **row)
            assert got[i, : want.shape[1]].tolist() == want[0].tolist()


def test_gates_by_token_weigh_the_function_of_each_module() -> None:
    """The second module sees the sum that came out of the first."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    net = pf.adapt(model, {"0": pf.Bottleneck(2), "2": pf.Bottleneck(2, of="input", activation="tanh")})
    adapters, x, g = [random(net, i, scale=0.5) for i in range(2)], torch.randn(3, 5, 4), torch.rand(3, 5, 2)
    y = x
    for name, layer in model.named_children():
        base = layer(y)
        if name in net.plan:
            alone = pf.adapt(nn.Sequential(layer), {"0": net.plan[name].method})
            each = [alone.apply({"0": a[name]}, y) - base for a in adapters]
            base = base + sum(g[..., k : k + 1] * change for k, change in enumerate(each))
        y = base
    close(net.gated(pf.stack(adapters), g, x), y)


def test_nets_of_both_families_in_one_batch() -> None:
    model = llama()
    nets = [
        pf.adapt(model, {"mlp": pf.Bottleneck(3)}),
        pf.adapt(model, {"down_proj": pf.LoRA(2), "mlp": pf.Bottleneck(2, activation="tanh")}),
        pf.adapt(model, {"q_proj": pf.LoRA(2), "self_attn": pf.LlamaAdapter(2)}),
    ]
    adapters = [random(net, i, scale=0.3) for i, net in enumerate(nets)]
    want = [logits(net, a, slice(None)) for net, a in zip(nets, adapters, strict=True)]
    want = [*want, model(IDS).logits]
    index = [1, -1, 0, 2, 1]
    rows = torch.stack([want[k][i] for i, k in enumerate(index)])
    close(pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], index, IDS).logits, rows)
    names = ["one", "two", "three"]
    bank = pf.bank({name: (net, a) for name, net, a in zip(names, nets, adapters, strict=True)})
    close(bank.apply([names[k] if k >= 0 else "__base__" for k in index], IDS).logits, rows)


@dataclass(frozen=True)
class Scale(pf.ModuleMethod):
    """x ⊙ (1 + s) goes in."""

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"s": rng.zeros(m.width_in)}

    def before(self, p: Leaf, m: pf.Place, x: Tensor, *seen: Tensor) -> Tensor:
        return x * (1 + p["s"])


def test_before_and_a_module_that_is_used_twice() -> None:
    """The module's own forward runs once a use, also with gates; one adapter serves both uses and both names."""
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return super().forward(x)

    layer = Counted(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer).eval()
    net = pf.adapt(model, {r"0|2": Scale()})
    assert list(net.plan) == ["0"]
    adapters, x = [random(net, i, scale=0.5) for i in range(2)], torch.randn(3, 5, 4)
    s = adapters[0]["0"]["s"]
    runs.clear()
    y = net.apply(adapters[0], x)
    assert len(runs) == 2
    close(y, layer((layer(x * (1 + s)).tanh()) * (1 + s)))
    runs.clear()
    net.gated(pf.stack(adapters), torch.rand(3, 5, 2), x)
    assert len(runs) == 2


@dataclass(frozen=True)
class Looks(pf.ModuleMethod):
    """y + w ⊙ (what `stem` gives) at tokens that count."""

    sees_mask: ClassVar[bool] = True
    stem: str = "layers.0.mlp"

    @property
    def watched(self) -> tuple[str, ...]:
        return (self.stem,)

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"w": rng.zeros(m.width)}

    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        mask, stem = seen
        assert mask.dtype is torch.bool
        return y + p["w"] * stem * mask[..., -y.shape[-2] :, None]


def test_watched_modules_and_the_mask_are_those_of_this_call() -> None:
    net = pf.adapt(llama(), {r"layers\.1": Looks(), r"layers\.0\.mlp": pf.Bottleneck(2)})
    adapters, mask = [random(net, i, scale=0.5) for i in range(3)], torch.ones_like(IDS)
    mask[2, :3] = 0
    found: list[Tensor] = []
    first = "model.layers.0.mlp"
    hooked = pf.as_module(pf.adapt(llama(), {first: pf.Bottleneck(2)}), {first: adapters[0][first]})

    def add(_: Any, args: Any, out: Tensor) -> Tensor:
        return out + adapters[0]["model.layers.1"]["w"] * found[-1] * mask[..., None]

    hooked.model.layers[0].mlp.register_forward_hook(lambda _, args, out: found.append(out))
    hooked.model.layers[1].register_forward_hook(add)
    close(net.apply(adapters[0], IDS, attention_mask=mask).logits, hooked(IDS, attention_mask=mask).logits)
    rows = torch.cat(
        [
            logits(net, adapters[k] if k >= 0 else None, slice(i, i + 1), attention_mask=mask[i : i + 1])
            for i, k in enumerate(INDEX)
        ]
    )
    close(net.mixed(pf.stack(adapters), INDEX, IDS, attention_mask=mask).logits, rows)
    m = pf.as_module(net, adapters[0])
    close(m(IDS, attention_mask=mask).logits, net.apply(adapters[0], IDS, attention_mask=mask).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    want = net.apply(adapters[0], IDS, method="generate", **options)
    assert torch.equal(m.generate(IDS, **options), want)
    assert torch.equal(net.apply(adapters[0], IDS, method="generate", use_cache=False, **options), want)
    assert not any(seen for held in m.modules() for seen in getattr(getattr(held, "seen", None), "found", {}).values())


@dataclass(frozen=True)
class Projects(pf.ModuleMethod):
    """y + s ⊙ v_proj(x)-like: it reads a weight of its module, so it runs once for each adapter."""

    per_row: ClassVar[bool] = False

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        m.get("up_proj")
        return {"s": rng.zeros(1)}

    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + p["s"] * m.module.up_proj(x)[..., : y.shape[-1]]


def test_a_method_reads_the_weights_of_each_row_s_adapter() -> None:
    net = pf.adapt(llama(), {"mlp": Projects(), "up_proj": pf.Bottleneck(2), r"up_proj\.weight": pf.LoRA(2)})
    assert len(net.plan) == 6
    adapters = [random(net, i, scale=0.3) for i in range(3)]
    stack, want = pf.stack(adapters), row_by_row(net, adapters)
    close(net.mixed(stack, INDEX, IDS).logits, want)
    hot = (torch.tensor(INDEX)[:, None] == torch.arange(3)).float()
    close(net.gated(stack, hot.requires_grad_(), IDS).logits, want)
    compiled = torch.compile(lambda s, i, x: net.mixed(s, i, x).logits, backend="aot_eager", fullgraph=True)
    close(compiled(stack, torch.tensor(INDEX), IDS), want)


def test_gradient_checkpointing_recomputes_with_the_call_s_own_adapters() -> None:
    model = llama().train()
    net = everything(model)
    adapters = [random(net, i, scale=0.3) for i in range(3)]

    def slopes() -> Any:
        stack = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in pf.stack(adapters).items()}
        y = net.mixed(stack, INDEX, IDS, use_cache=False).logits
        net.mixed(pf.stack(adapters[::-1]), INDEX, IDS, use_cache=False)  # another call meanwhile
        y.square().sum().backward()
        return {n: {k: t.grad for k, t in leaf.items()} for n, leaf in stack.items()}

    want = slopes()
    model.activation_checkpointing_enable()
    for name, leaf in slopes().items():
        for key, g in leaf.items():
            close(g, want[name][key], 1e-4)


def test_a_recomputation_that_comes_too_late_is_refused() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
            return y

    net = pf.adapt(Recomputed().eval(), {"layer": pf.Bottleneck(2)})
    a = {"layer": {k: t.requires_grad_() for k, t in random(net, 1)["layer"].items()}}
    y = net.apply(a, torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="layer: used after its call was over"):
        y.sum().backward()


WRONG: list[tuple[dict[str, pf.Method], str]] = [
    ({"2": pf.Bottleneck(2, dim=5)}, r"2: Bottleneck.after gets hidden states \[1, 5, 4\].*give dim=4"),
    ({"conv": pf.Bottleneck(2, dim=4)}, r"conv: its hidden states have shape \[1, 3, .*rows in the first dimension"),
]


@pytest.mark.parametrize(("rules", "match"), WRONG, ids=[r for rules, _ in WRONG for r in rules])
def test_hidden_states_that_do_not_fit_are_named(rules: dict[str, pf.Method], match: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("2", nn.Linear(4, 4))
            self.conv = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.get_submodule("2")(x)[None])[0]
            return y

    net = pf.adapt(Odd().eval(), rules)
    with pytest.raises(ValueError, match=match):
        net.mixed(pf.stack([net.init(0), net.init(1)]), [0, 1, -1], torch.randn(3, 5, 4))
