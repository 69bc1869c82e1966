"""Every model × a handful of methods: identity, merge, purity, mixed, vmap, gradients, dtypes, generate, params."""

import re
from functools import lru_cache
from typing import Any

import pytest
import torch
from models import CASES, Case, by_name
from support import call, close, random, same_state, state, trees_close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA, Method, VeRA

LINEAR: dict[str, Method] = {
    "lora": LoRA(2, alpha=3.0),
    "lora_bias": LoRA(2, rslora=True, lora_bias=True),
    "dora": DoRA(2),
    "ia3": IA3(),
    "ia3_ff": IA3(feedforward=True),
    "full": Full(),
    "loha": LoHa(2),
    "vera": VeRA(3),
    "oft": OFT(2),
}
EVERYWHERE: dict[str, Method] = {
    "matrices_lora": LoRA(2),
    "matrices_dora": DoRA(2),
    "matrices_ia3": IA3(),
    "everything_full": Full(),
}
# nn.TransformerEncoderLayer's fused attention has no batching rule on the CPU; vmap falls back to a loop and says so.
LOOPS = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
BIASED = {"gpt2", "bert", "whisper", "mlp", "shared", "recurrent"}  # all of whose linear-like sites have a bias
ODD = {"convs", "vit", "whisper", "recurrent"}  # inputs of odd width, or heads of odd width: no blocks of two


def rules(case: Case, kind: str) -> dict[str, Method]:
    return {case.linear: LINEAR[kind]} if kind in LINEAR else {".*": EVERYWHERE[kind]}


def fits(case: Case, kind: str) -> bool:
    return not (kind == "lora_bias" and case.name not in BIASED) and not (kind == "oft" and case.name in ODD)


def pairs(kinds: Any, cases: list[Case] = CASES) -> Any:
    return pytest.mark.parametrize(
        ("case", "kind"), [pytest.param(c, k, id=f"{c}-{k}") for c in cases for k in kinds if fits(c, k)]
    )


ALL = pairs([*LINEAR, *EVERYWHERE])
SOME = pairs(["lora", "dora", "matrices_lora", "everything_full"])


@lru_cache(maxsize=1)
def adapted(case: Case, kind: str) -> tuple[nn.Module, pf.Adapted]:
    model = case.build()
    return model, pf.adapt(model, rules(case, kind))


def run(case: Case, net: pf.Adapted, a: Any, rows: slice = slice(0, 3), **more: Any) -> Tensor:
    args, kwargs = cut(case, rows)
    return case.output(net.apply(a, *args, **kwargs, **more))


def cut(case: Case, rows: slice = slice(0, 3)) -> Any:
    return tree_map(lambda v: v[rows] if isinstance(v, Tensor) else v, case.inputs(3))


def base(case: Case, model: nn.Module, weights: dict[str, Tensor] | None = None) -> Tensor:
    return case.output(call(model, weights or {}, *cut(case)))


def loss(case: Case, net: pf.Adapted, a: Any) -> Tensor:
    return run(case, net, a).float().square().mean()


@ALL
def test_a_fresh_adapter_is_the_identity(case: Case, kind: str) -> None:
    model, net = adapted(case, kind)
    close(run(case, net, net.init(3)), base(case, model))


@ALL
def test_apply_is_the_merged_model_and_the_base_is_untouched(case: Case, kind: str) -> None:
    model, net = adapted(case, kind)
    before, a = state(model), random(net)
    got, merged = run(case, net, a), net.merge(a, untied=True)
    close(got, base(case, model, merged))
    assert (got - base(case, model)).abs().max() > 1e-4, "the adapter changed nothing"
    assert merged.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    for name, p in model.named_parameters(remove_duplicate=False):
        assert merged[name].shape == p.shape
        assert merged[name].dtype == p.dtype
    assert same_state(before, state(model))


@SOME
def test_prepared_is_the_same_adapter(case: Case, kind: str) -> None:
    _, net = adapted(case, kind)
    a = random(net)
    close(run(case, net, net.prepare(a)), run(case, net, a))


@LOOPS
@pairs(["lora", "dora", "ia3", "full", "oft", "matrices_lora", "everything_full"])
def test_a_mixed_batch_is_one_call_a_row_or_an_error(case: Case, kind: str) -> None:
    _, net = adapted(case, kind)
    many, index = [random(net, s) for s in (1, 2)], [1, 0, -1]
    args, kwargs = cut(case)
    silent = pf.scale(many[0], 0.0)
    want = [run(case, net, many[k] if k >= 0 else silent, slice(i, i + 1)) for i, k in enumerate(index)]
    try:
        got = case.output(net.mixed(pf.stack(many), index, *args, **kwargs))
    except ValueError as e:
        message = str(e)
    else:
        close(got, torch.cat(want))
        return
    assert not (case.mixed and kind in LINEAR), f"must work here: {message}"
    assert any(message.startswith(name) for name in net.plan), f"names no site: {message}"
    assert "rows" in message


@LOOPS
@pairs(["lora", "dora", "matrices_lora", "everything_full"], [c for c in CASES if c.vmap])
def test_vmap_over_adapters_is_a_loop(case: Case, kind: str) -> None:
    _, net = adapted(case, kind)
    many = [random(net, s) for s in (1, 2)]
    args, kwargs = cut(case)
    got = vmap(lambda a: case.output(net.apply(a, *args, **kwargs)))(pf.stack(many))
    close(got, torch.stack([run(case, net, a) for a in many]))


@pairs(["lora", "dora", "ia3", "matrices_lora", "everything_full"])
def test_backward_is_grad_and_the_merged_models_gradient(case: Case, kind: str) -> None:
    model, net = adapted(case, kind)
    a = random(net)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), a)
    before = state(model)
    loss(case, net, leaves).backward()
    assert same_state(before, state(model)), "a gradient accumulated on the base"
    got = tree_map(lambda t: t.grad if t.grad is not None else torch.zeros_like(t), leaves)
    assert max(float(t.abs().max()) for leaf in got.values() for t in leaf.values()) > 1e-6
    trees_close(got, grad(lambda a: loss(case, net, a))(a))
    if kind != "dora":  # whose norm is a constant of the gradient by definition; delta and merge know the same
        want = grad(lambda a: base(case, model, net.merge(a)).float().square().mean())(a)
        trees_close(got, want)


@pairs(["lora", "dora", "ia3", "everything_full"])
def test_a_bf16_base_with_fp32_leaves(case: Case, kind: str) -> None:
    model = case.build().bfloat16()
    net = pf.adapt(model, rules(case, kind))
    a = random(net, scale=0.05)
    assert all(t.dtype == torch.float32 for leaf in a.values() for t in leaf.values())
    args, kwargs = tree_map(lambda v: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v, cut(case))
    got = case.output(net.apply(a, *args, **kwargs))
    merged = net.merge(a, untied=True)
    assert got.dtype == torch.bfloat16
    assert all(t.dtype == torch.bfloat16 for t in merged.values())
    wide = {n: t.float() for n, t in merged.items()}
    exact = case.output(call(case.build(), wide, *cut(case)))
    rounded = case.output(call(model, merged, args, kwargs)).float()
    noise = float((rounded - exact).abs().max()) / max(1.0, float(exact.detach().abs().max()))
    close(got, exact, max(0.02, 2 * noise))  # within twice what bf16 itself costs the merged model


@pytest.mark.parametrize("kind", ["lora", "dora", "matrices_lora", "everything_full"])
@pytest.mark.parametrize("case", [c for c in CASES if c.generate], ids=str)
def test_generate_is_the_merged_models(case: Case, kind: str) -> None:
    model, net = adapted(case, kind)
    a, options = random(net), {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ids = by_name["llama"].inputs(2)[0][0]
    before = state(model)
    merged = case.build()
    for name, p in merged.named_parameters(remove_duplicate=False):
        module, _, attr = name.rpartition(".")  # ties are cut: each slot gets its own
        setattr(merged.get_submodule(module), attr, nn.Parameter(net.merge(a, untied=True)[name]))
        assert p.shape == net.merge(a, untied=True)[name].shape
    mask = torch.ones_like(ids)
    got = net.apply(a, ids, method="generate", attention_mask=mask, **options)
    assert torch.equal(got, merged.generate(ids, attention_mask=mask, **options))
    assert torch.equal(got, net.apply(a, ids, method="generate", attention_mask=mask, **options)), "a cache survived"
    assert same_state(before, state(model))


@SOME
def test_params_given_by_the_caller(case: Case, kind: str) -> None:
    model, net = adapted(case, kind)
    a = random(net)
    params = {n: p.detach() * 1.1 for n, p in model.named_parameters()}  # ties by one name, as torch.func users have it
    got = run(case, net, a, params=params)
    other = case.build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    close(got, run(case, pf.adapt(other, rules(case, kind)), a))
    assert (got - run(case, net, a)).abs().max() > 1e-4
    g = grad(lambda p: run(case, net, a, params=p).float().square().mean())(params)
    leaf = {n: p.clone().requires_grad_() for n, p in params.items()}
    run(case, net, a, params=leaf).float().square().mean().backward()
    for name, p in leaf.items():
        close(p.grad if p.grad is not None else torch.zeros_like(p), g[name], 5e-5)


def test_a_tied_parameter_follows_its_one_name() -> None:
    case = by_name["tied"]
    model = case.build()
    net = pf.adapt(model, {"mid": LoRA(2)})
    a, new = random(net), torch.randn_like(model.embed.weight)
    ids = cut(case)[0]
    for name in ("embed.weight", "head.weight"):
        tied = net.apply(a, *ids, params={name: new})
        close(
            tied,
            functional_call(model, net.merge(a) | {"embed.weight": new, "head.weight": new}, ids, tie_weights=False),
        )
    split = {"embed.weight": new, "head.weight": 2 * new}
    close(net.apply(a, *ids, params=split), call(model, net.merge(a) | split, ids, {}))


def test_two_names_of_a_tied_tensor_are_two_slots() -> None:
    case = by_name["tied"]
    model = case.build()
    merged = (net := pf.adapt(model, {"embed": Full()})).merge(random(net), untied=True)
    assert not torch.equal(merged["embed.weight"], model.embed.weight)
    assert torch.equal(merged["head.weight"], model.head.weight)
    both = pf.adapt(model, {r"embed|head": Full()})
    assert set(both.plan) == {"embed.weight", "head.weight"}


@pytest.mark.parametrize("case", [by_name["mixtral"], by_name["gpt_oss"]], ids=str)
@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_experts_run_another_way(case: Case, how: str) -> None:
    """transformers' other implementations index a whole batch of experts, or multiply them all at once."""
    model = case.build()
    net = pf.adapt(model, {case.linear: LoRA(2)})
    a = random(net)
    want = run(case, net, a)
    model.set_experts_implementation(how)
    close(run(case, net, a), want)
    if how == "batched_mm":
        many = [random(net, s) for s in (1, 2)]
        args, kwargs = cut(case)
        got = vmap(lambda a: case.output(net.apply(a, *args, **kwargs)))(pf.stack(many))
        close(got, torch.stack([run(case, net, a) for a in many]))


def test_every_rule_takes_what_its_case_says() -> None:
    for case in CASES:
        names = [n for n in pf.sites(case.build()) if re.search(case.linear, n)]
        assert names, case
