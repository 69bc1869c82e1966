"""Models whose weights a hook puts in place for each call: accelerate's offload and dispatch, and layerwise casting."""

import tempfile
import weakref
from collections.abc import Callable
from functools import cache, partial
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.big_modeling import attach_layerwise_casting_hooks
from accelerate.utils.offload import OffloadedWeightsLoader
from support import random, trees_close
from torch import Tensor, nn

import peftfn as pf

IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
RULES: dict[str, pf.Method] = {
    "q_proj": pf.LoRA(4),
    "v_proj": pf.DoRA(4),
    "k_proj": pf.LoRA(2, lora_bias=True),
    "o_proj": pf.VeRA(8),
    "norm": pf.Full(),
    "up_proj": pf.PiSSA(2),
    "down_proj": pf.OFT(4),
    "mlp": pf.Bottleneck(4),
    "embed_tokens": pf.LoRA(2),
    "lm_head": pf.Full(),
}


def llama(tied: bool = False) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, attention_bias=True, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def mapped(model: Any) -> Any:
    """Parts on two devices, on the CPU and on the disk, as device_map="auto" has it."""
    where = ["cpu", "disk", "cpu", "disk", "cpu", "disk"]
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    options = {"main_device": "cpu", "offload_dir": tempfile.mkdtemp(), "force_hooks": True}
    return dispatch_model(model, dict(zip(parts, where, strict=True)), **options)


KINDS: dict[str, Callable[[Any], Any]] = {
    "cpu": lambda m: cpu_offload(m, "cpu"),
    "cpu, buffers too": lambda m: cpu_offload(m, "cpu", offload_buffers=True),
    "cpu, layers whole": lambda m: cpu_offload(m, "cpu", preload_module_classes=["LlamaDecoderLayer"]),
    "disk": lambda m: disk_offload(m, tempfile.mkdtemp(), "cpu"),
    "a map": mapped,
    "all but in its call": lambda m: cpu_offload_with_hook(m, "cpu")[0],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def loss(net: pf.Adapted, a: pf.Adapter) -> Tensor:
    return net.apply(a, IDS).logits.square().mean()


def gradient(net: pf.Adapted, a: pf.Adapter) -> Any:
    return torch.func.grad(lambda a: loss(net, a))(a)


@cache
def plain(merges: bool = False) -> tuple[pf.Adapted, pf.Adapter, pf.Adapter]:
    """The net of the model without hooks, and two adapters; merges: of methods that can be merged."""
    rules = {k: m for k, m in RULES.items() if k not in ("k_proj", "mlp")} if merges else RULES
    net = pf.adapt(llama(), rules)
    return net, random(net, 1), random(net, 2)


def as_it_was(model: nn.Module) -> list[Any]:
    out: list[Any] = []
    for m in model.modules():
        tensors = [(k, t) for d in (m._parameters, m._buffers) for k, t in d.items() if t is not None]
        out += [(k, id(t), t.device, t.dtype, t._version) for k, t in tensors]
        out += [(k, id(v)) for k, v in vars(m).items()]
        hook = vars(m).get("_hf_hook")
        out += [] if hook is None else [(k, id(v)) for k, v in vars(hook).items()]
    return out


@every_kind
def test_everything_is_as_without_a_hook(kind: str, tmp_path: Any) -> None:
    net, a, b = plain()
    model = KINDS[kind](llama())
    other = pf.adapt(model, RULES)
    base = model(IDS).logits
    before = as_it_was(model)
    trees_close(other.init(seed=1), net.init(seed=1))
    trees_close({n: e.frozen for n, e in other.plan.items()}, {n: e.frozen for n, e in net.plan.items()})
    torch.testing.assert_close(other.apply(a, IDS).logits, net.apply(a, IDS).logits)
    trees_close(gradient(other, a), gradient(net, a))
    stacked, index = pf.stack([a, b]), [1, -1]
    torch.testing.assert_close(other.mixed(stacked, index, IDS).logits, net.mixed(stacked, index, IDS).logits)
    told = {"max_new_tokens": 3, "do_sample": False, "method": "generate"}
    assert torch.equal(other.apply(a, IDS, **told), net.apply(a, IDS, **told))
    trees_close(other.prepare(a), net.prepare(a))
    pf.save(tmp_path, other, a)
    again, same = pf.load(tmp_path, model)
    torch.testing.assert_close(loss(again, same), loss(net, a))
    assert as_it_was(model) == before
    assert torch.equal(model(IDS).logits, base)


@every_kind
def test_gradients_with_and_without_rematerialisation(kind: str) -> None:
    net, a, _ = plain()
    other = pf.adapt(KINDS[kind](llama()), RULES)
    want = gradient(net, a)
    for each in (other, other.checkpointed("layers")):
        leaves = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}
        loss(each, leaves).backward()
        trees_close({n: {k: t.grad for k, t in leaf.items()} for n, leaf in leaves.items()}, want)
    trees_close(gradient(other.checkpointed("layers"), a), want)


@every_kind
def test_merging(kind: str) -> None:
    net, a, _ = plain(merges=True)
    model = KINDS[kind](llama())
    other = pf.adapt(model, net.plan.rules)
    got, want = other.merge(a), net.merge(a)
    trees_close({"": got}, {"": want})
    trees_close({"": other.delta(a)}, {"": net.delta(a)})
    torch.testing.assert_close(torch.func.functional_call(llama(), got, (IDS,)).logits, net.apply(a, IDS).logits)


@pytest.mark.parametrize("kind", ["cpu", "a map"])
def test_threads(kind: str) -> None:
    net, a, b = plain()
    other, out = pf.adapt(KINDS[kind](llama()), RULES), {}

    def run(i: int) -> None:
        out[i] = other.apply((a, b)[i % 2], IDS).logits

    threads = [Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, y in sorted(out.items()):
        torch.testing.assert_close(y, net.apply((a, b)[i % 2], IDS).logits)
    assert len(out) == 4


def test_one_layer_is_loaded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0
    load = OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> Tensor:
        nonlocal most
        values = load(self, key).numpy().copy()
        alive.append(weakref.ref(values))  # which lives as long as the storage of the tensor
        alive[:] = [r for r in alive if r() is not None]
        most = max(most, len(alive))
        return torch.from_numpy(values)

    other = pf.adapt(disk_offload(llama(), tempfile.mkdtemp(), "cpu"), {r"_proj\.weight": pf.LoRA(2)})
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    a = other.init()
    uses = [other.init, lambda: other.apply(a, IDS), lambda: other.prepare(a), lambda: other.delta(a)]
    for use in uses:
        most = 0
        with torch.no_grad():
            use()
        assert 1 <= most <= 4  # a weight and its bias, and those of the layer before, of 23


def test_parameters_of_the_caller_stay_in_place() -> None:
    net, a, _ = plain()
    name = "model.layers.0.self_attn.q_proj.weight"
    given = {name: torch.randn(32, 32, requires_grad=True)}
    want = torch.func.grad(lambda p: net.apply(a, IDS, params=p).logits.square().mean())(given)
    other = pf.adapt(KINDS["cpu"](llama()), RULES)
    got = torch.func.grad(lambda p: other.apply(a, IDS, params=p).logits.square().mean())(given)
    trees_close({"": got}, {"": want})


def test_tied_weights_are_known_also_where_they_are_offloaded() -> None:
    for make in (KINDS["cpu"], KINDS["disk"]):
        model = make(llama(tied=True))
        assert pf.sites(model)["lm_head.weight"].tied == ("model.embed_tokens.weight",)
        net = pf.adapt(model, {"embed_tokens": pf.LoRA(2)})
        with pytest.raises(ValueError, match=r"embed_tokens\.weight: it is tied to lm_head\.weight"):
            net.merge(random(net))


@pytest.mark.parametrize("rules", [{".*": pf.PrefixTuning(n=2)}, {"self_attn": pf.LlamaAdapter(n=2)}], ids=str)
def test_methods_that_call_parts_of_their_module(rules: dict[str, pf.Method]) -> None:
    net, other = pf.adapt(llama(), rules), pf.adapt(KINDS["disk"](llama()), rules)
    a = random(net)
    trees_close(other.init(seed=1), net.init(seed=1))
    torch.testing.assert_close(other.apply(a, IDS).logits, net.apply(a, IDS).logits)
    trees_close(gradient(other, a), gradient(net, a))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x)).tanh())
        return y


class Peeks(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down.weight.sum()


def test_offloaded_buffers_and_what_a_call_writes_to_them() -> None:
    torch.manual_seed(0)
    source = Normed()
    state = {k: t.clone() for k, t in source.state_dict().items()}
    model, same = cpu_offload(source, "cpu", offload_buffers=True), Normed()
    same.load_state_dict(state)
    x, rules = torch.randn(5, 8), {"up|norm": pf.Full(), "down": pf.LoRA(2)}
    net, other = pf.adapt(same, rules), pf.adapt(model, rules)
    a = random(net)
    torch.testing.assert_close(other.apply(a, x), net.apply(a, x))
    assert torch.equal(model.norm._hf_hook.weights_map["running_mean"], state["norm.running_mean"])


def test_what_cannot_be_followed_is_said() -> None:
    net = pf.adapt(cpu_offload(llama(), "cpu"), {"q_proj": pf.LoRA(2)})
    for use in (pf.as_module, pf.merged_model):
        with pytest.raises(ValueError, match=r"^model\.embed_tokens: .*in place for each call.*Use the net"):
            use(net, net.init())
    with pytest.raises(ValueError, match=r"^model\.layers\.1: .*a new block begins as a copy.*without offload"):
        pf.adapt(net.model, {"layers.1": pf.LlamaPro()})
    odd = pf.adapt(cpu_offload(Peeks(), "cpu"), {"down": pf.LoRA(2)})
    with pytest.raises(RuntimeError, match=r"^down\.weight: .*outside of the forward of its layer"):
        odd.apply(odd.init(), torch.randn(5, 8))
    compiled = torch.compile(net.apply, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="which the compiler cannot follow"):
        compiled(net.init(), IDS)


# Layerwise casting: the weights have eight bits between calls, and the compute dtype in them.


class Casting:
    """diffusers' LayerwiseCastingHook, hung around a forward as its HookRegistry does (read in diffusers 0.42.1)."""

    def __init__(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        self.storage_dtype, self.compute_dtype = storage_dtype, compute_dtype

    def hang(self, layer: nn.Module) -> None:
        held = SimpleNamespace(forward=layer.forward)

        def new_forward(module: nn.Module, *args: Any) -> Any:
            module.to(self.compute_dtype)
            out = held.forward(*args)
            module.to(self.storage_dtype)
            return out

        layer.to(self.storage_dtype)
        layer.__dict__["forward"] = partial(new_forward, layer)
        layer.__dict__["_diffusers_hook"] = SimpleNamespace(hooks={"casting": self}, _fn_refs=[held])


def by_accelerate(model: Any, small: torch.dtype) -> None:
    attach_layerwise_casting_hooks(model, small, torch.bfloat16, skip_modules_pattern=["norm", "embed_tokens"])


def by_diffusers(model: Any, small: torch.dtype) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            Casting(small, torch.bfloat16).hang(layer)


@pytest.mark.parametrize("casts", [by_accelerate, by_diffusers])
def test_layerwise_casting(casts: Callable[[Any, torch.dtype], None]) -> None:
    small = torch.float8_e4m3fn
    same, model = llama().to(torch.bfloat16), llama().to(torch.bfloat16)
    for layer in same.modules():
        if isinstance(layer, nn.Linear):
            layer.to(small).to(torch.bfloat16)
    casts(model, small)
    net, other = pf.adapt(same, RULES), pf.adapt(model, RULES)
    a = random(net)
    trees_close(other.init(seed=1), net.init(seed=1))
    assert torch.equal(other.apply(a, IDS).logits, net.apply(a, IDS).logits)
    trees_close(gradient(other, a), gradient(net, a))
    assert {p.dtype for p in model.parameters()} == {small, torch.bfloat16}
    assert torch.equal(model(IDS).logits, same(IDS).logits)


def test_another_hook_of_diffusers_is_refused() -> None:
    model = llama()
    Casting(torch.float16, torch.float32).hang(model.lm_head)
    model.lm_head._diffusers_hook.hooks["more"] = SimpleNamespace()
    with pytest.raises(ValueError, match=r"^lm_head: diffusers put a SimpleNamespace around"):
        pf.adapt(model, {"q_proj": pf.LoRA(2)})
