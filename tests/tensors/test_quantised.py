"""Adapters on quantised layers: bitsandbytes, torchao, and layers that show no weight at all."""

import copy
import logging
import os
import warnings
from abc import ABC
from functools import partial

import pytest
import torch
import transformers
from support import everywhere
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import peftfn as pf
from peftfn.core.method import registry
from peftfn.model.model import modules_of, quantised_in, weights_of
from peftfn.tensors import quantised_layers
from peftfn.tensors.quantised import quantised
from peftfn.testing import shaken

with warnings.catch_warnings():  # of torch's own changes, when they are imported
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says of every product that it rounds its input
IN, OUT = 64, 192  # bitsandbytes packs blocks of 64 on some CPUs


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Packed(nn.Module):
    """What GPTQ, AWQ, HQQ, EETQ and AQLM layers have in common: sizes, integer buffers, and a product of their own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w = linear.weight.detach()
        self.register_buffer("scales", w.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (w / self.scales).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.kernel = "works"

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel != "works":
            raise RuntimeError("no kernel image for this device")
        y = self.product(x, (self.qweight * self.scales).to(x.dtype))
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T


class PackedForInference(Packed):
    """A kernel that autograd knows nothing of."""

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x.detach() @ w.T


def bnb4(linear: nn.Linear, nested: bool = False) -> nn.Module:
    bias = linear.bias is not None
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=bias, quant_type="nf4", compress_statistics=nested
    )
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def bnb8(linear: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def ao(linear: nn.Linear, config=Int8WeightOnlyConfig) -> nn.Module:
    new = nn.Sequential(copy.deepcopy(linear))
    quantize_(new, config())
    return new[0]


KINDS = {
    "bnb4": bnb4,
    "bnb4 nested": partial(bnb4, nested=True),
    "bnb8": bnb8,
    "torchao": ao,
    "packed": Packed,
    "packed for inference": PackedForInference,
}
ROUNDS_INPUT = {"bnb8": bnb8, "torchao dynamic": partial(ao, config=Int8DynamicActivationInt8WeightConfig)}


def replaced(model: nn.Module, make) -> nn.Module:
    """The model with every linear layer made anew."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(layer))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The model with the quantised layers' own values in ordinary ones."""
    model = copy.deepcopy(model)
    for name, w in quantised_in(modules_of(model)).items():
        path = name.removesuffix(".weight")
        parent, _, last = path.rpartition(".")
        b = w.bias()
        new = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, dtype=w.dtype)
        new.load_state_dict({"weight": w.dense()} | ({} if b is None else {"bias": b}))
        setattr(model.get_submodule(parent), last, new)
    return model


def model_of(kind: str, train: bool = True) -> nn.Module:
    """Train mode by default: on a CPU bitsandbytes' 8-bit layer does not round its input then."""
    torch.manual_seed(0)
    return replaced(TwoLayers(), (KINDS | ROUNDS_INPUT)[kind]).train(train)


def close(a, b, rtol=1e-4):
    """Trees or tensors, equal relative to the largest value; finite."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            close(a[k], b[k], rtol)
        return
    assert a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max() <= rtol * max(b.abs().max().item(), 1e-2), (a - b).abs().max()


def loss(net, a, x):
    return net.apply(a, x).square().mean()


METHODS = [
    m
    for cls in registry.values()
    if cls.__module__.startswith("peftfn.methods") and "linear" in cls.kinds
    for m in [cls(**cls.cases[0])]
    if m.eval() == m
]
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_adapter_means_what_it_means_on_the_dequantised_weights(method):
    for kind in KINDS:
        base = model_of(kind)
        net, plain = (everywhere(pf.adapt(m, {r"up\.weight": method})) for m in (base, dequantised(base)))
        fresh = net.init(3)
        close(fresh, plain.init(3), 1e-3)
        a = shaken(fresh, 5, 0.05)
        close(net.apply(a, X), plain.apply(a, X))
        close(grad(partial(loss, net))(a, X), grad(partial(loss, plain))(a, X), 1e-3)
        if method.mergeable:
            close(net.delta(a), plain.delta(a), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_agree_with_backward(kind):
    net = pf.adapt(model_of(kind), {r"up|down": pf.LoRA(rank=4)})
    a, b = (shaken(net.init(i), i, 0.05) for i in range(2))
    both = pf.stack([a, b])
    f = partial(loss, net)
    g = grad(f)(a, X)
    ours = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}
    f(ours, X).backward()
    close(g, {n: {k: t.grad for k, t in leaf.items()} for n, leaf in ours.items()})
    close(vmap(net.apply, (0, None))(both, X)[1], net.apply(b, X))
    close({n: {k: t[0] for k, t in leaf.items()} for n, leaf in vmap(grad(f), (0, None))(both, X).items()}, g)
    _, tangent = jvp(lambda a: f(a, X), (a,), (b,))
    close(tangent, sum((g[n][k] * b[n][k]).sum() for n in g for k in g[n]), 1e-3)
    product = grad(lambda a: jvp(lambda a: f(a, X), (a,), (b,))[1])(a)  # Hessian times b
    e = 1e-2
    moved = [
        grad(f)({n: {k: t + s * e * b[n][k] for k, t in leaf.items()} for n, leaf in a.items()}, X) for s in (1, -1)
    ]
    close(product, {n: {k: (moved[0][n][k] - moved[1][n][k]) / (2 * e) for k in g[n]} for n in g}, 3e-2)
    close(net.mixed(both, [1, 0, -1, 1, 0], X)[0], net.apply(b, X[:1])[0])
    close(net.mixed(both, [1, 0, -1, 1, 0], X)[2], net.model(X[2:3])[0])


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by torch's own tracer
@pytest.mark.parametrize("kind", ["bnb4", "torchao", "packed"])
def test_compiles_without_a_break(kind):
    torch._dynamo.reset()
    net = pf.adapt(model_of(kind), {r"up|down": pf.LoRA(rank=4)})
    a = shaken(net.init(), 1, 0.05)
    f = partial(loss, net)
    close(torch.compile(net.apply, fullgraph=True, backend="aot_eager")(a, X), net.apply(a, X))
    close(torch.compile(grad(f), fullgraph=True, backend="aot_eager")(a, X), grad(f)(a, X))


@pytest.mark.parametrize("kind", ROUNDS_INPUT)
def test_layers_that_round_their_input_keep_doing_so(kind):
    base = model_of(kind, train=False)
    want = copy.deepcopy(base)(X)
    net = pf.adapt(base, {r"up|down": pf.LoRA(rank=4)})
    close(net.apply(net.init(), X), want, 1e-5)
    a = shaken(net.init(), 1, 0.05)
    plain = pf.adapt(dequantised(base), {r"up|down": pf.LoRA(rank=4)})
    close(net.apply(a, X), plain.apply(a, X), 3e-2)
    close(grad(partial(loss, net))(a, X), grad(partial(loss, plain))(a, X), 5e-2)


def inside(module: nn.Module) -> list:
    """What a layer's parameters, and bitsandbytes' states in them and in the layer, hold."""
    owners = [*module._parameters.values(), *(v for k, v in vars(module).items() if k.endswith("state"))]
    owners += [o.quant_state for o in owners if isinstance(o, bnb.nn.Params4bit)]
    return [v for o in owners if o is not None for v in vars(o).values()]


def plain(t: Tensor) -> Tensor:
    return t.dequantize() if type(t).__module__.startswith("torchao") else t


@pytest.mark.parametrize("kind", KINDS | ROUNDS_INPUT)
@pytest.mark.parametrize("train", [True, False])
def test_the_base_stays_as_it_is_whoever_is_called_first(kind, train):
    """bitsandbytes' forward takes SCB out of an 8-bit weight, and packs a 4-bit one anew on some CPUs."""
    want = model_of(kind, train)(X)
    base = model_of(kind, train)
    held = {n: t.clone() for n, t in base.state_dict().items()}
    attributes = {n: (vars(m).copy(), inside(m)) for n, m in base.named_modules()}
    net = pf.adapt(base, {"up": pf.LoRA(rank=4)})  # `down` is quantised and not adapted
    first = net.apply(net.init(), X)
    for n, m in base.named_modules():
        old, values = attributes[n]
        assert vars(m).keys() == old.keys() and all(vars(m)[k] is v for k, v in old.items())
        assert len(inside(m)) == len(values) and all(a is b for a, b in zip(inside(m), values, strict=True))
    assert base.state_dict().keys() == held.keys()
    assert all(torch.equal(plain(t), plain(held[n])) for n, t in base.state_dict().items())
    close(first, want, 1e-2)
    with torch.no_grad():
        close(base(X), want, 1e-2)
    close(net.apply(net.init(), X), want, 1e-2)
    base.up = KINDS["bnb4"](nn.Linear(IN, OUT))  # the owner's changes are seen
    with torch.no_grad():
        close(net.apply(net.init(), X), base(X), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_for_backward(kind):
    net = pf.adapt(model_of(kind), {r"up|down": pf.LoRA(rank=1)})
    kept: list[Tensor] = []
    a = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in net.init().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = net.apply(a, X).sum()
    y.backward()
    assert kept and max(t.numel() for t in kept) < IN * OUT


@pytest.mark.parametrize(("kind", "bits"), [("bnb4", 3), ("bnb4 nested", 3), ("bnb8", 7), ("torchao", 7)])
def test_merge_quantises_again(kind, bits):
    base = model_of(kind)
    net = pf.adapt(base, {r"up|down": pf.LoRA(rank=4, lora_bias=False)})
    a = shaken(net.init(), 1, 0.05)
    merged = net.merge(a)
    want = pf.adapt(dequantised(base), {r"up|down": pf.LoRA(rank=4)}).merge(a)
    target = copy.deepcopy(base)
    for name in ("up", "down"):
        new = merged[f"{name}.weight"]
        assert type(new) is type(getattr(base, name).weight)
        getattr(target, name).weight = new
        w = quantised(getattr(target, name)).dense()
        step = want[f"{name}.weight"].abs().max() / 2**bits  # the widest gap of NF4 is 0.3 of the block's largest
        assert (w - want[f"{name}.weight"]).abs().max() <= 1.7 * step
    assert weights_of(base)["up.weight"].dense().equal(weights_of(model_of(kind))["up.weight"].dense())
    close(target(X), net.apply(a, X), 0.25 if bits == 3 else 0.03)
    if kind != "bnb8":  # whose layers keep what they are called with
        close(functional_call(base, merged, (X,)), target(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [pf.LoRA(rank=4), pf.DoRA(rank=4), pf.HRA(rank=2), pf.LoHa(rank=2)])
def test_any_dtype_of_the_input(method, dtype):
    for kind in ("bnb4", "bnb8", "packed"):
        base = model_of(kind)
        net, plain = (pf.adapt(m, {r"up|down": method}) for m in (base, dequantised(base).to(dtype)))
        a = shaken(net.init(), 1, 0.05)
        y = net.apply(a, X.to(dtype))
        assert y.dtype == dtype
        close(y.double(), plain.apply(a, X.to(dtype)).double(), 5e-2)


def test_autocast():
    net = pf.adapt(model_of("bnb4"), {r"up|down": pf.LoRA(rank=4)})
    a = {n: {k: t.requires_grad_() for k, t in v.items()} for n, v in shaken(net.init(), 1, 0.05).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = net.apply(a, X)
    close(y.float(), net.apply(a, X), 3e-2)
    y.float().square().sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for v in a.values() for t in v.values())


@pytest.mark.parametrize("kind", KINDS)
def test_scale_prepare_and_files(kind, tmp_path):
    base = model_of(kind)
    net = pf.adapt(base, pf.targets(base, pf.DoRA(rank=4), "all-linear"))
    assert list(net.plan) == ["up.weight", "down.weight"]
    a = shaken(net.init(), 1, 0.05)
    close(net.apply(pf.scale(a, 0.0), X), base(X))
    close(net.apply(net.prepare(a), X), net.apply(a, X))
    for file in ("native", "peft"):
        pf.save(tmp_path / file, net, a, format=file)
        again, b = pf.load(tmp_path / file, base)
        close(again.apply(b, X), net.apply(a, X), 1e-6)
    line = pf.summary(net, by_site=False)
    rules = {r"(up|down)\.weight": pf.DoRA(rank=4)}
    if "packed" not in kind:  # whose bias is no parameter
        assert line == pf.summary(pf.adapt(dequantised(base), rules), by_site=False)


@pytest.mark.parametrize("kind", KINDS)
def test_as_module(kind):
    base = model_of(kind)
    for method in (pf.LoRA(rank=4), pf.DoRA(rank=4), pf.IA3(), pf.LoRA(rank=4, lora_bias=True)):
        net = pf.adapt(base, {"up|down": method} if method != pf.IA3() else {r"weight": method})
        a = shaken(net.init(), 1, 0.05)
        want = grad(partial(loss, net))(a, X)
        held = {n: plain(t).clone() for n, t in base.state_dict().items()}
        m = pf.as_module(net, a)
        assert type(m).__name__ == "TwoLayers"
        close(m(X), net.apply(a, X))
        with m.use(None):
            close(m(X), base(X))
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
        m(X).square().mean().backward()
        optimizer.step()
        close(pf.adapter_of(m), {n: {k: t - want[n][k] for k, t in leaf.items()} for n, leaf in a.items()})
        copied = copy.deepcopy(m)
        close(copied(X), net.apply(pf.adapter_of(m), X))
        m.eval()(X)
        assert all(torch.equal(plain(t), held[n]) for n, t in base.state_dict().items())


def test_peft_loads_and_agrees_at_four_bits(tmp_path):
    """PEFT's own QLoRA on the same base: its file, our outputs and gradients; and our file in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        base = model_of("bnb4", train=False)
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
        )
        with torch.no_grad():
            for n, p in theirs.named_parameters():
                if "lora_B" in n:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(n)))
        theirs.save_pretrained(tmp_path / "theirs")
    net, a = pf.load(tmp_path / "theirs", base)
    x = X.clone().requires_grad_()  # bitsandbytes packs its weights where nothing needs a gradient
    want = theirs(x)
    close(net.apply(a, X), want)
    want.square().mean().backward()
    g = grad(partial(loss, net))(a, X)
    close(g["up.weight"]["a"], theirs.base_model.model.up.lora_A["default"].weight.grad)
    pf.save(tmp_path / "ours", net, a, format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    close(back(x), want)


def test_qlora_trains_the_demos_model():
    """At 4 bits, a few steps: the gradient is the dequantised base's, the loss goes down, the base stays."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peftfn.demo.model import Base

    small = Base(2)
    base = small.model
    base.layers = base.layers[:4]
    for layer in base.layers:
        attention = layer.attention.self
        attention.query, attention.value = bnb4(attention.query), bnb4(attention.value)
    texts = [("a dull and lifeless film", 0), ("I loved every minute of it", 1), ("waste of time", 0), ("superb", 1)]
    ids, mask = small.tokens(texts, 16)
    labels = torch.tensor([t for _, t in texts])
    rules = {"query|value": pf.LoRA(rank=4), "head": pf.Full()}
    net, plain = pf.adapt(base, rules), pf.adapt(dequantised(base), rules)
    held = {n: t.clone() for n, t in base.state_dict().items()}

    def error(net, a):
        return nn.functional.cross_entropy(net.apply(a, ids, mask), labels)

    a = net.init()
    close(grad(partial(error, net))(a), grad(partial(error, plain))(a), 1e-3)
    leaves = [t.requires_grad_() for leaf in a.values() for t in leaf.values()]
    optimizer = torch.optim.AdamW(leaves, lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        error(net, a).backward()
        optimizer.step()
        losses.append(error(net, a).item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(torch.equal(base.state_dict()[n], t) for n, t in held.items())


@pytest.mark.parametrize(
    "method", [pf.LoRA(rank=2), pf.VeRA(rank=2), pf.LoKr(**pf.LoKr.cases[0]), pf.OFT(block_size=4), pf.IA3()]
)
def test_these_never_ask_for_the_weights_numbers(method):
    model = model_of("bnb4")
    net = pf.adapt(model, {r"up\.weight": method})
    a, want = net.init(), model(X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(quantised(model.up)), "matrix", None)
        close(net.apply(a, X), want)


def test_a_container_with_sizes_is_no_quantised_layer():
    model = TwoLayers()
    model.in_features = model.out_features = IN
    model.register_buffer("count", torch.zeros(1, dtype=torch.long))
    bare = nn.Module()
    bare.in_features, bare.out_features = IN, OUT
    assert quantised(model) is None and quantised(bare) is None
    assert list(pf.adapt(model, {"weight": pf.LoRA()}).plan) == ["up.weight", "down.weight"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads_quantised(bits, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    wanted = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["lm_head"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=wanted, dtype=torch.bfloat16)
    net = pf.adapt(base, pf.targets(base, pf.LoRA(rank=4), "all-linear"))
    assert len(net.plan) == 14 and all(e.site.quantised for e in net.plan.values())
    ids = torch.arange(12).view(2, 6)
    a = shaken(net.init(), 1, 0.02)
    dense = nn.Module.to(dequantised(base), torch.bfloat16)  # transformers refuses to cast what it quantised
    plain = pf.adapt(dense, net.plan.rules)
    close(net.apply(a, ids).logits.float(), plain.apply(a, ids).logits.float(), 0.06)
    assert torch.equal(net.apply(a, ids, method="generate", max_new_tokens=3)[:, :6], ids)
    leaves = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}
    net.apply(leaves, ids, labels=ids).loss.backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for leaf in leaves.values() for t in leaf.values())


class QModuleMixin(ABC):  # noqa: B024 - as quanto has it
    """What quanto's layers derive from: they quantise anew whatever they find for a weight that is not their own."""


class QLinear(QModuleMixin, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert type(self.weight).__name__ == "Int8Tensor", "quantised anew"
        return super().forward(x)


def test_a_layer_that_takes_no_weight_but_its_own_runs_by_the_weight_s_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(QLinear(IN, OUT), nn.Tanh(), QLinear(OUT, IN))
    quantize_(model, Int8WeightOnlyConfig())
    net = pf.adapt(model, {"weight": pf.LoRA(2)})
    a = shaken(net.init(), 1)
    plain = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    dense = {k: t.dequantize() if hasattr(t, "dequantize") else t for k, t in model.state_dict().items()}
    plain.load_state_dict({k: t.detach() for k, t in dense.items()})
    want = pf.adapt(plain, {"weight": pf.LoRA(2)}).apply(a, X)
    torch.testing.assert_close(net.apply(a, X), want, rtol=1e-4, atol=1e-4)
    m = pf.as_module(net, a)
    assert isinstance(m[0], QLinear)
    torch.testing.assert_close(m(X), want, rtol=1e-4, atol=1e-4)


class Signs(nn.Module):
    """A layer that no kind recognises: its weight is signs times a scale, and it names no sizes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("signs", torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) > 0)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.register_parameter("weight", nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.signs * 2.0 - 1).T * self.scale


class SignWeight(quantised_layers.QuantisedWeight):
    own_forward = True

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return isinstance(layer, Signs)

    def times(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def matrix(self) -> Tensor:
        return (self.layer.signs * 2.0 - 1) * self.layer.scale


def test_a_new_kind_is_one_class():
    base, plain = nn.Sequential(Signs()), nn.Sequential(nn.Linear(IN, OUT, bias=False))
    plain[0].weight.data = (base[0].signs * 2.0 - 1) * 0.1
    quantised_layers.KINDS.insert(0, SignWeight)
    try:
        for method in (pf.LoRA(rank=4), pf.DoRA(rank=4)):
            net, dense = (pf.adapt(m, {r"0\.weight": method}) for m in (base, plain))
            a = shaken(net.init(), 1, 0.05)
            close(net.apply(a, X), dense.apply(a, X))
            close(grad(partial(loss, net))(a, X), grad(partial(loss, dense))(a, X))
            close(pf.as_module(net, a)(X), dense.apply(a, X))
            with pytest.raises(ValueError, match=r"0\.weight: Signs cannot be made from a dense weight"):
                net.merge(a)
    finally:
        quantised_layers.KINDS.remove(SignWeight)


class TestErrors:
    def test_a_layer_that_is_not_quantised_yet(self):
        model = nn.Sequential(bnb.nn.Linear4bit(IN, OUT))
        with pytest.raises(ValueError, match=r"0\.weight: Linear4bit .* not quantised yet; move the model"):
            pf.adapt(model, {"0": pf.LoRA()})

    def test_a_layer_that_quantises_at_each_call(self):
        model = nn.Sequential(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True))
        with pytest.raises(ValueError, match=r"0\.weight: Linear8bitLt .*has_fp16_weights=False"):
            pf.adapt(model, {"0": pf.LoRA()})

    def test_a_quantised_embedding(self):
        model = nn.Sequential(bnb.nn.Embedding4bit(IN, OUT, quant_type="nf4").to("cpu"))
        with pytest.raises(ValueError, match=r"0\.weight: the weight is torch\.uint8.*dequantise"):
            pf.adapt(model, {"0": pf.LoRA()})

    def test_merging_into_a_layer_that_nobody_can_make(self):
        net = pf.adapt(model_of("packed"), {"up": pf.LoRA(rank=4)})
        with pytest.raises(ValueError, match=r"up\.weight: Packed cannot be made .*Keep the adapter beside it"):
            net.merge(net.init())

    def test_a_method_that_needs_a_weight_nobody_can_read(self):
        model = model_of("packed")
        model.up.kernel = "missing"
        net = pf.adapt(model, {"up": pf.LoRA(rank=4)})
        net.init()  # LoRA never looks at the weight
        with pytest.raises(ValueError, match=r"up\.weight: Packed cannot be dequantised here .*no kernel.*like LoRA"):
            pf.adapt(model, {"up": pf.PiSSA(rank=4)})


def agree(model: nn.Module, rules: dict, x: Tensor, tol: float = 1e-3, **kwargs) -> None:
    """An adapter on quantised layers and on their own values: outputs, gradients, rows of several, the module view."""

    def out(f, *args):
        y = f(*args, **kwargs)
        return getattr(y, "logits", y)

    net, plain = (pf.adapt(m, rules) for m in (model, dequantised(model)))
    a, b = (shaken(net.init(i), i, 0.05) for i in (1, 2))
    close(net.init(3), plain.init(3), tol)
    close(out(net.apply, a, x), out(plain.apply, a, x), tol)
    g, want = (grad(lambda a, f=n.apply: out(f, a, x).square().mean())(a) for n in (net, plain))
    close(g, want, tol)
    both = pf.stack([a, b])
    close(out(net.mixed, both, [0, 1, -1], x[:3]), out(plain.mixed, both, [0, 1, -1], x[:3]), tol)
    close(out(pf.as_module(net, a), x), out(plain.apply, a, x), tol)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_around_quantised_modules(kind):
    agree(model_of(kind), {r"up\.weight": pf.LoRA(4), "up": pf.Bottleneck(4), "down": pf.LoReFT(rank=2)}, X)


@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao", "packed"])
def test_prompts_and_prefixes_on_a_quantised_model(kind):
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_attention_heads=4))
    model = replaced(llama, KINDS[kind]).train()  # no dropout in it; and bitsandbytes rounds inputs in eval mode
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(0))
    agree(model, {".*": pf.PromptTuning(n=3), "mlp": pf.Bottleneck(4), "q_proj": pf.LoRA(2)}, ids)
    agree(model, {".*": pf.PrefixTuning(n=3)}, ids)


class Kernel(torch.autograd.Function):
    """A product that vmap knows nothing of."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


class PackedForNoTransform(Packed):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return Kernel.apply(x, w)


class PackedWithFunction(PackedForNoTransform):
    """HQQ's layers have such a function."""

    def dequantize(self) -> Tensor:
        return self.qweight * self.scales


class Coded(Packed):
    """Integers and scales in parameters, as AQLM has them, and a weight that the first forward keeps, as INC does."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        for name in ("bias", "scales", "qweight"):
            b = self._buffers.pop(name)
            self.register_parameter(name, None if b is None else nn.Parameter(b, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "weight"):
            self.weight = self.qweight * self.scales
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("method", [pf.LoRA(4), pf.DoRA(4), pf.Full()], ids=lambda m: type(m).__name__)
def test_a_layer_that_stores_its_weight_in_other_parameters(called, method):
    """They are no sites; its bias is."""
    torch.manual_seed(0)
    model = replaced(TwoLayers(), Coded)
    if called:
        model(X)
    rules = {"up.weight|down": method, "up": pf.Full()}
    assert list(pf.adapt(model, rules).plan) == ["up.bias", "up.weight", "down.weight"]
    agree(model, rules, X)


class Sizes:
    """It shows what a weight shows, and is none."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.layer.out_features, self.layer.in_features))


class Compiled(Packed):
    """GPTQModel's layers: `weight` shows sizes alone, and what makes it dense is compiled, in an attribute."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.sizes = Sizes(self)
        self.dequantize_weight = torch.compile(self.dequantize_weight, backend="eager")

    @property
    def weight(self) -> Sizes:
        return self.sizes

    def dequantize_weight(self) -> Tensor:
        return (self.qweight * self.scales).T

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ self.dequantize_weight()


@pytest.mark.parametrize("method", [pf.LoRA(4), pf.DoRA(4), pf.Full(), pf.OFT(4)], ids=lambda m: type(m).__name__)
def test_a_layer_whose_weight_is_no_tensor_and_whose_methods_are_compiled(method):
    torch.manual_seed(0)
    model = replaced(TwoLayers(), Compiled)
    agree(model, {r"up\.weight": method, "down": pf.Bottleneck(4)}, X)
    agree(model, {r"up\.weight|down": method}, X)


class OldFunction(torch.autograd.Function):
    """No transform takes it."""

    @staticmethod
    def forward(ctx, t):
        return t.qweight * t.scales


class PackedForNone(PackedForNoTransform):
    """quanto's tensors are made dense by such a function."""

    def dequantize(self) -> Tensor:
        return OldFunction.apply(self)


@pytest.mark.parametrize("make", [PackedForNoTransform, PackedWithFunction, PackedForNone])
@pytest.mark.parametrize("method", [pf.LoRA(4), pf.DoRA(4), pf.Full(), pf.OFT(4)], ids=lambda m: type(m).__name__)
def test_a_kernel_without_a_batching_rule(make, method):
    torch.manual_seed(0)
    agree(replaced(TwoLayers(), make), {r"up\.weight": method}, X)
