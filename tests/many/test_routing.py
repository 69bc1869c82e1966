"""Gates that are functions, and routing as in PEFT and the papers."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.poly.layer import PolyLayer
from support import random
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [3, 3, 1, 5, 2]])
RULES: dict[str, pf.Method] = {"q_proj": pf.LoRA(rank=2), "v_proj": pf.DoRA(rank=2), "mlp": pf.Bottleneck(2)}


@cache
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@cache
def experts() -> tuple[pf.Adapted, Any]:
    net = pf.adapt(llama(), RULES)
    return net, pf.stack([random(net, seed=s, scale=0.3) for s in range(3)])


def logits(gates: Any, **more: Any) -> Tensor:
    net, many = experts()
    out: Tensor = net.gated(many, gates, input_ids=IDS, **more).logits
    return out


G = torch.softmax(torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(3)), -1)
H = torch.softmax(torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(4)), -1)


def test_a_mapping_of_one_tensor_is_the_tensor() -> None:
    torch.testing.assert_close(logits({".*": G}), logits(G))


def test_a_mapping_is_a_function_of_the_site() -> None:
    each = {"q_proj": G, "v_proj": H, "mlp": G}
    got = logits(each)
    torch.testing.assert_close(got, logits(lambda site, x: H if "v_proj" in site else G))
    assert not torch.allclose(got, logits(G), atol=1e-4)


def test_the_first_pattern_that_matches_takes_a_site() -> None:
    torch.testing.assert_close(logits({"q_proj": G, ".*": H}), logits({"q_proj": G, "v_proj": H, "mlp": H}))


def test_gates_of_one_site_act_there_alone() -> None:
    zero = torch.zeros(3, 3)
    net, many = experts()
    alone = {n: {k: t if "q_proj" in n else torch.zeros_like(t) for k, t in leaf.items()} for n, leaf in many.items()}
    alone |= {n: leaf for n, leaf in many.items() if "v_proj" in n}
    want = net.gated(alone, {"q_proj": G, "v_proj": zero, "mlp": G}, input_ids=IDS).logits
    torch.testing.assert_close(logits({"q_proj": G, "v_proj": zero, "mlp": zero}), want)


@pytest.mark.parametrize(
    ("gates", "text"),
    [
        ({"q_proj": G, "v_proj": G}, r"no pattern of the gates matches model\.layers\.0\.mlp"),
        ({".*": G, "o_proj": G}, "'o_proj' takes none of the 6 sites"),
        ({}, "empty"),
        ({".*": torch.ones(3, 2)}, "for 2 adapters, and the stack has 3"),
        (lambda site, x: torch.ones(3, 2), r"self_attn\.q_proj.*\[3, 2\].*gates of 3 adapters"),
        (lambda site, x: torch.ones(2, 3), r"self_attn\.q_proj.*\[2, 3\] for an input \[3, 5, 16\]"),
        (lambda site, x: None, "returns a NoneType"),
        ({".*": pf.PerForward(lambda **kwargs: G)}, "put the PerForward around"),
    ],
)
def test_gates_that_do_not_fit_are_early_errors(gates: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        logits(gates)


def test_a_function_at_a_site_without_an_input_is_an_error() -> None:
    net = pf.adapt(llama(), {r"norm\.weight": pf.Full()})
    with pytest.raises(ValueError, match=r"norm\.weight: a function of the weight has no input"):
        net.gated(pf.stack([random(net), random(net, 1)]), lambda site, x: x[..., :2], input_ids=IDS)


def test_a_function_weighs_the_bias_of_its_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2, lora_bias=True)})
    many, x = pf.stack([random(net, 0), random(net, 1)]), torch.randn(5, 4)
    g = torch.softmax(x[:, :2], -1)
    torch.testing.assert_close(net.gated(many, lambda site, x: torch.softmax(x[:, :2], -1), x), net.gated(many, g, x))


def test_gradients_reach_gates_and_what_makes_them() -> None:
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    of_gates = grad(lambda g: logits({"q_proj": g, "v_proj": H, "mlp": H}).square().mean())(G)
    route = lambda w: lambda site, x: torch.softmax(x @ w.mT, -1)  # noqa: E731
    of_router = grad(lambda w: logits(route(w)).square().mean())(w)
    for g in (of_gates, of_router):
        assert g.isfinite().all() and g.abs().max() > 0
    for t, at, d in ((G, (0, 0, 0), of_gates), (w, (0, 0), of_router)):
        step = torch.zeros_like(t)
        step[at] = 1e-2
        f = (lambda g: {"q_proj": g, "v_proj": H, "mlp": H}) if t is G else route
        slope = (logits(f(t + step)).square().mean() - logits(f(t - step)).square().mean()) / 2e-2
        torch.testing.assert_close(slope, d[at], rtol=0.05, atol=2e-5)


def test_vmap_over_gates_and_compile() -> None:
    f = lambda g: logits({"q_proj": g, "v_proj": H, "mlp": H})  # noqa: E731
    both = torch.stack([G, H])
    torch.testing.assert_close(vmap(f)(both), torch.stack([f(G), f(H)]), rtol=1e-4, atol=1e-5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    net = pf.adapt(model, {".*weight": pf.LoRA(rank=2)})
    many, x, g = pf.stack([random(net, 0), random(net, 1)]), torch.randn(5, 4), torch.rand(5, 2)
    run = lambda g: net.gated(many, {"0": g, "2": 1 - g}, x)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(g), run(g))


def test_rematerialised_layers_keep_the_gradient_of_a_router() -> None:
    net, many = experts()
    less = net.checkpointed("layers")
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    f = lambda net: grad(  # noqa: E731
        lambda w: net.gated(many, lambda s, x: torch.softmax(x @ w.mT, -1), input_ids=IDS, use_cache=False).logits.sum()
    )(w)
    torch.testing.assert_close(f(less), f(net))


def generated(gates: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    net, many = experts()
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    out: Tensor = net.gated(many, gates, method="generate", input_ids=ids, **options)
    return out


def test_generate_with_gates_of_sites_is_row_by_row() -> None:
    gates = lambda rows: {"q_proj": G[rows, 0], ".*": H[rows, 0]}  # noqa: E731
    want = torch.cat([generated(gates(slice(i, i + 1)), IDS[i : i + 1]) for i in range(3)])
    assert torch.equal(generated(gates(slice(None))), want)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_functions_needs_no_whole_sequence(beams: int) -> None:
    sub = pf.adapt(llama(), {"q_proj": pf.LoRA(rank=2)})
    some = pf.stack([random(sub, seed=s, scale=0.3) for s in range(3)])
    route = pf.routing.arrow(sub, some, k=2)
    options: Any = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "num_beams": beams,
    }
    with_, without = (
        sub.gated(some, route, method="generate", input_ids=IDS, use_cache=c, **options) for c in (True, False)
    )
    assert torch.equal(with_, without)
    assert sub.model.generation_config is llama().generation_config


def test_per_forward_is_its_function_of_the_call() -> None:
    f = lambda input_ids, **_: torch.softmax((input_ids[..., None] * torch.arange(3.0)).sin(), -1)  # noqa: E731
    torch.testing.assert_close(logits(pf.PerForward(f)), logits(f(IDS)))


def test_per_forward_is_made_anew_at_each_step_and_leaves_no_hook() -> None:
    net, _ = experts()
    seen: list[int] = []

    def f(input_ids: Tensor, **_: Any) -> Tensor:
        seen.append(input_ids.shape[1])
        return torch.softmax((input_ids[..., None] * torch.arange(3.0)).sin(), -1)

    got = generated(pf.PerForward(f))
    assert seen == [5, 1, 1, 1]
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, logits_of(f(ids), ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)
    assert not net.model._forward_pre_hooks and not net._runner._idle[-1].root._forward_pre_hooks


def logits_of(gates: Any, ids: Tensor) -> Tensor:
    net, many = experts()
    out: Tensor = net.gated(many, gates, input_ids=ids).logits
    return out


# Against PEFT.


def loras(n: int, folder: Path) -> tuple[pf.Adapted, Any, list[str]]:
    """Our net of n LoRAs that PEFT wrote, their stack, and PEFT's folders."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for k in range(n):
        torch.manual_seed(10 + k)
        peft.get_peft_model(copy.deepcopy(llama()), config).save_pretrained(folder / str(k))
    loaded = [pf.load(folder / str(k), llama()) for k in range(n)]
    return loaded[0].net, pf.stack([one.adapter for one in loaded]), [str(folder / str(k)) for k in range(n)]


@pytest.mark.parametrize("general", [False, True])
def test_arrow_is_pefts(general: bool, tmp_path: Path) -> None:
    net, many, folders = loras(5, tmp_path)
    task, know = folders[:3], folders[3:]
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=42)
    model = peft.create_arrow_model(
        base_model=copy.deepcopy(llama()),
        task_specific_adapter_paths=task,
        arrow_config=config,
        general_adapter_paths=know if general else [],
    ).eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    part = lambda s: {n: {k: t[s] for k, t in leaf.items()} for n, leaf in many.items()}  # noqa: E731
    used = part(slice(0, 3))
    if general:
        used = pf.routing.without_general(used, part(slice(3, 5)))
    route = pf.routing.arrow(net, used, k=2, temperature=0.7, steps=15)
    torch.testing.assert_close(net.gated(used, route, input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_arrows_directions_are_the_singular_vectors() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(6, 5)), {"0.weight": pf.LoRA(rank=3)})
    many, x = pf.stack([random(net, 0), random(net, 1)]), torch.randn(4, 6)
    vs = [torch.linalg.svd(net.delta(a)["0.weight"])[2][0] for a in pf.unstack(many)]
    want = torch.softmax((x @ torch.stack(vs).mT).abs(), -1)
    torch.testing.assert_close(pf.routing.arrow(net, many)("0.weight", x), want)
    steps = pf.routing.arrow(net, many, steps=400)("0.weight", x)
    torch.testing.assert_close(steps, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    ],
)
def test_xlora_is_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    net, many, folders = loras(3, tmp_path)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_depth=2,
        xlora_size=8,
        adapters={str(k): f for k, f in enumerate(folders)},
        softmax_temperature=0.5,
        **options,
    )
    base = copy.deepcopy(llama())
    base.config.use_cache = False
    model = peft.get_peft_model(base, config).eval()
    layers = model.base_model.internal_xlora_classifier.layers
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.5)
        want = model(input_ids=IDS).logits
    params = dict(layers.named_parameters())
    gates = pf.routing.xlora(
        net,
        lambda h: functional_call(layers, params, (h,)),
        layerwise=options.get("layerwise_scalings", False),
        k=options.get("top_k_lora"),
        softmax=options.get("enable_softmax", True),
        softmax_top_k=options.get("enable_softmax_topk", False),
        temperature=0.5,
    )
    torch.testing.assert_close(net.gated(many, gates, input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
    run: Any = {"input_ids": IDS, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "use_cache": False}
    assert torch.equal(net.gated(many, gates, method="generate", pad_token_id=0, **run), model.generate(**run))


def test_poly_is_pefts() -> None:
    config = peft.PolyConfig(
        r=2, target_modules=["q_proj", "v_proj"], n_tasks=3, n_skills=4, n_splits=2, init_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(llama()), config).eval()
    net = pf.adapt(llama(), {"[qv]_proj": pf.Poly(rank=2, skills=4, splits=2)})
    tasks: Any = {}
    for name in net.plan:
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        a, b = (getattr(layer, f"poly_lora_{k}")["default"] for k in "AB")
        with torch.no_grad():
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
        z = layer.poly_router["default"].module_logits
        tasks[name] = {"a": a.detach().expand(3, *a.shape), "b": b.detach().expand(3, *b.shape), "z": z.detach()}
    with torch.no_grad():
        want = model.base_model.model
        handles = []
        index = torch.tensor([2, 0, 1])
        for layer in want.modules():
            if isinstance(layer, PolyLayer):
                handles.append(
                    layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "task_ids": index}), with_kwargs=True)
                )
        logits = want(input_ids=IDS).logits
    torch.testing.assert_close(net.mixed(tasks, index, input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_shared_skills_is_the_sum_over_tasks() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(4, 6)), {"0.weight": pf.Poly(rank=2, skills=2, relaxed=False)})
    leaf, x = random(net)["0.weight"], torch.randn(3, 4)
    zs = torch.randn(2, 2)

    def tasks(a: Tensor) -> Any:
        return {"0.weight": {"a": a.expand(2, *a.shape), "b": leaf["b"].expand(2, *leaf["b"].shape), "z": zs}}

    got = grad(lambda a: net.mixed(tasks(a), [0, 1, 1], x).square().sum())(leaf["a"])
    one = lambda a, i, k: net.apply({"0.weight": {**leaf, "a": a, "z": zs[k]}}, x[i : i + 1]).square().sum()  # noqa: E731
    want = sum(grad(one)(leaf["a"], i, k) for i, k in enumerate((0, 1, 1)))
    torch.testing.assert_close(got, want)


# The papers' formulas, written out.


def test_phatgoose_is_its_formula() -> None:
    x, v = torch.randn(4, 8), torch.randn(3, 8)
    standard = lambda t: (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    scores = standard(x) @ standard(v).mT / 8**0.5
    want = torch.zeros(4, 3)
    for i, row in enumerate(scores):
        first, second = row.argsort(descending=True)[:2].tolist()
        total = row[first].exp() + row[second].exp()
        want[i, first], want[i, second] = row[first].exp() / total, row[second].exp() / total
    torch.testing.assert_close(pf.routing.phatgoose({"s": v}, k=2)("s", x), want)


def test_the_sigmoid_gate_trains_on_one_expert() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
    a, x, v = random(net), torch.randn(3, 8), torch.randn(8)
    got = net.gated(pf.stack([a]), pf.routing.sigmoid_gate({"0.weight": v}), x)
    base, full = net.model(x), net.apply(a, x)
    torch.testing.assert_close(got, base + torch.sigmoid(x @ v)[:, None] * (full - base))


@pytest.mark.parametrize("shared", [False, True])
def test_moelora_is_its_formula(shared: bool) -> None:
    model = nn.Linear(6, 5)
    method = pf.MoELoRA(rank=2, experts=3, active=None if shared else 2, alpha=3.0, shared_a=shared)
    net = pf.adapt(model, {"weight": method})
    p, x = random(net, scale=0.5)["weight"], torch.randn(4, 6)
    want = model(x)
    for i in range(4):
        scores = p["router"] @ x[i]
        used = list(range(3)) if shared else scores.topk(2).indices.tolist()
        g = torch.softmax(scores[used], 0)
        for weight, k in zip(g, used, strict=True):
            a = p["a"] if shared else p["a"][k]
            want[i] = want[i] + 1.5 * weight * (p["b"][k] @ (a @ x[i]))
    torch.testing.assert_close(net.apply({"weight": p}, x), want)
    with pytest.raises(ValueError, match="active=4 experts of 3"):
        pf.MoELoRA(experts=3, active=4)


def test_a_routed_mixture_trains_as_one_tree() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), {"weight": pf.LoRA(rank=2)})
    widths = {"0.weight": 4, "2.weight": 6}
    start = lambda seed: {n: torch.zeros(3, d) for n, d in widths.items()}  # noqa: E731
    mixture = pf.Routed(net, 3, lambda w, site, x: torch.softmax(x @ w[site].mT, -1), start)
    a, x = mixture.init(seed=1), torch.randn(5, 4)
    torch.testing.assert_close(mixture.apply(a, x), net.model(x))  # fresh experts change nothing
    g = grad(lambda a: mixture.apply(a, x).square().mean())(a)
    assert g["experts"]["0.weight"]["b"].abs().max() > 0 and g["router"].keys() == widths.keys()
    ensemble = pf.stack([a, mixture.init(seed=2)])
    assert vmap(mixture.apply, (0, None))(ensemble, x).shape == (2, 5, 3)
    with pytest.raises(KeyError, match="experts and router"):
        mixture.apply(net.init(), x)
    with pytest.raises(ValueError, match="at least 1"):
        pf.Routed(net, 0, lambda w, site, x: x, start)


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (4, 1.0), (2, 0.0)])
def test_top_k_refuses_what_it_cannot_do(k: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="top_k"):
        pf.routing.top_k(torch.ones(3), k, temperature)
