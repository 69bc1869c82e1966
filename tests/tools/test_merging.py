"""pf.merging: laws over methods and kinds of site, PEFT's weighted adapters where PEFT is right, and bad input."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from support import FIRST, random
from torch import Tensor, nn

import peftfn as pf
from peftfn.core.method import MATRIX
from peftfn.testing import MODELS, Case, close
from peftfn.testing.models import OUT
from peftfn.tools.spaces import subspaces

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`", "ignore:Adapter"
)
M = pf.merging
SITE = "layer.weight"
RULES: dict[str, Callable[..., Any]] = {
    "linear": M.linear,
    "magnitude": partial(M.magnitude, density=0.6),
    "ties": partial(M.ties, density=0.6),
    "ties by frequency": partial(M.ties, density=0.6, elect="frequency"),
    "dare": partial(M.dare, density=0.6),
    "dare ties": partial(M.dare, density=0.6, elect="total"),
    "della": partial(M.della, density=0.6, epsilon=0.3),
    "tsv": M.tsv,
    "iso_c": M.iso_c,
}
RANDOM = {"dare", "dare ties", "della"}
BY_ENTRY = ("magnitude", "ties", "ties by frequency", "dare", "dare ties", "della")


def pairs(model: nn.Module, *ranks: int, **fields: Any) -> list[Any]:
    """Random LoRAs of several ranks and scales on one model."""
    out = []
    for i, r in enumerate(ranks):
        net = pf.adapt(model, {"weight": pf.LoRA(rank=r, alpha=3.0 + i, **fields)})
        out.append((net, random(net, seed=i)))
    return out


def delta(pair: Any, site: str = SITE) -> Tensor:
    net, a = pair
    return net.delta(a)[site]


def summed(ps: list[Any], w: list[float], site: str = SITE) -> Tensor:
    return torch.stack([x * delta(p, site) for x, p in zip(w, ps, strict=True)]).sum(0)


# One adapter.


@pytest.mark.parametrize("method", [m for m in FIRST if m.mergeable], ids=str)
def test_one_adapter_with_weight_one_is_itself(method: pf.Method) -> None:
    """PEFT's is off by 7 % for rsLoRA and by half for DoRA."""
    c = Case(method)
    a = c.adapter()
    for rule in (M.linear, M.tsv, partial(M.ties, density=1.0), partial(M.dare, density=1.0)):
        net, b = rule([(c.net, a)], [1.0])
        assert net is c.net and b.keys() == a.keys() and all(b[k] is a[k] for k in a)


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_one_adapter_is_nearly_itself_where_its_tensors_are_made_anew(name: str) -> None:
    """TSV of all that there is; Iso-C of a change whose singular values are equal."""
    model = nn.Sequential(nn.Linear(8, 6))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=3)})
    q, p = (torch.linalg.qr(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)))[0] for n in (8, 6))
    a = {"0.weight": {"a": q.mT, "b": 0.7 * p}}
    merged = RULES[name]([(net, a)], torch.ones(1))
    close(delta(merged, "0.weight"), delta((net, a), "0.weight"), name, rtol=1e-5)


# Sums.


@pytest.mark.parametrize("kind", list(MODELS))
def test_linear_is_the_weighted_sum_at_every_kind_of_site(kind: str) -> None:
    methods = [pf.LoRA(rank=2, alpha=5.0), pf.LoRA(rank=3, rslora=True)] if MODELS[kind].kind in MATRIX else [pf.Full()]
    cases = [Case(m, kind) for m in methods]
    model, rule = cases[0].model, cases[0].rule
    ps = []
    for i, m in enumerate((*methods, methods[0])):
        net = pf.adapt(model, {rule: m})
        ps.append((net, random(net, i)))
    w = [0.7, -1.5, 2.0][: len(ps)]
    got = M.linear(ps, w)
    for site in got[0].plan:
        close(delta(got, site), summed(ps, w, site), "sum", rtol=1e-5)
    if MODELS[kind].kind in MATRIX:
        assert got[0].plan[SITE].method == pf.LoRA(rank=7)


@pytest.mark.parametrize("method", [m for m in FIRST if m.mergeable and not m.overrides("bank")], ids=str)
def test_linear_of_any_method_at_full_rank(method: pf.Method) -> None:
    c = Case(method)
    ps = [(c.net, c.adapter(0)), (c.net, c.adapter(1))]
    merged = M.linear(ps, [0.5, -2.0], rank=OUT)
    close(delta(merged), summed(ps, [0.5, -2.0]), "sum")


@pytest.mark.parametrize("method", [pf.Full(), pf.MiSS(**pf.MiSS.cases[0]), pf.SHiRA(**pf.SHiRA.cases[0])], ids=str)
def test_methods_that_are_linear_in_their_tensors_stay(method: pf.Method) -> None:
    c = Case(method)
    ps = [(c.net, c.adapter(0)), (c.net, c.adapter(1))]
    net, a = M.linear(ps, [0.5, -2.0])
    assert net is c.net
    close(delta((net, a)), summed(ps, [0.5, -2.0]), "sum", rtol=1e-5)


def test_a_bias_is_merged_too_and_sites_may_differ() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    a = pf.adapt(model, {"0": pf.LoRA(rank=2, lora_bias=True), "1": pf.Full()})
    b = pf.adapt(model, {"[02].weight": pf.LoRA(rank=1)})
    ps = [(a, random(a)), (b, random(b))]
    net, merged = M.linear(ps, [2.0, -1.0])
    assert list(net.plan) == ["0.weight", "1.weight", "1.bias", "2.weight"]
    close(net.bias_deltas(merged)["0.weight"], 2 * a.bias_deltas(ps[0][1])["0.weight"], "bias")
    close(net.delta(merged)["1.bias"], 2 * a.delta(ps[0][1])["1.bias"], "norm")
    close(net.delta(merged)["2.weight"], -b.delta(ps[1][1])["2.weight"], "one alone")
    for rule in RULES.values():
        net, merged = rule(ps, **({} if rule in (M.linear, M.tsv, M.iso_c) else {"space": "core"}))
        assert net.bias_deltas(merged)["0.weight"].isfinite().all()


def test_the_weights_have_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    ps, x = pairs(model, 2, 2), torch.randn(4, 8)

    def loss(w: Tensor) -> Tensor:
        net, a = M.linear(ps, w)
        return net.apply(a, x).square().sum()

    w = torch.tensor([0.5, 1.0], requires_grad=True)
    (g,) = torch.autograd.grad(loss(w), w)
    h = 1e-3 * torch.eye(2)
    slope = torch.stack([(loss(w.detach() + e) - loss(w.detach() - e)) / 2e-3 for e in h])
    torch.testing.assert_close(g, slope, rtol=1e-2, atol=1e-3)


# Laws of the rules.


@pytest.mark.parametrize("space", ["dense", "core", "knots", "shared"])
@pytest.mark.parametrize("name", [n for n in RULES if n not in RANDOM])
def test_the_order_does_not_matter(name: str, space: str) -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    ps, w = pairs(model, 2, 3, 1), [1.0, 0.5, -0.7]
    more = {"space": space} if name in BY_ENTRY else {}
    more |= {"rank": 10} if space == "dense" else {"rank": 3} if "space" in more and space == "shared" else {}
    here = RULES[name](ps, w, **more)
    there = RULES[name]([ps[i] for i in (2, 0, 1)], [w[i] for i in (2, 0, 1)], **more)
    close(delta(here, "0.weight"), delta(there, "0.weight"), name)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_linear_in_another_space_is_linear(space: Any) -> None:
    """No entry is trimmed at density 1, so that magnitude pruning is the weighted sum."""
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    ps, w = pairs(model, 2, 3, 1), [1.0, 0.5, -0.7]
    merged = M.magnitude(ps, w, density=1.0, space=space)
    for site in merged[0].plan:
        close(delta(merged, site), summed(ps, w, site), space, rtol=1e-5)


@pytest.mark.parametrize("name", list(RULES))
def test_ranks_are_as_promised(name: str) -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    ps = pairs(model, 2, 3)
    spaces: list[dict[str, Any]] = [{"space": "core"}, {"space": "knots"}] if name in BY_ENTRY else [{}]
    for more in spaces:
        net, _ = RULES[name](ps, **more)
        assert net.plan["0.weight"].method == pf.LoRA(rank=5)
    for more in [*spaces, {"space": "dense"}] if name in BY_ENTRY else spaces:
        merged = RULES[name](ps, rank=2, **more)
        assert merged[0].plan["0.weight"].method == pf.LoRA(rank=2)
        if name == "iso_c":  # all of its singular values are equal, so no two of them are the largest
            continue
        full = RULES[name](ps, rank=10, **more)
        u, s, vh = torch.linalg.svd(delta(full, "0.weight"))
        close(delta(merged, "0.weight"), u[:, :2] * s[:2] @ vh[:2], "nearest")


@pytest.mark.parametrize("name", [n for n in RULES if n in BY_ENTRY])
def test_two_equal_adapters_agree(name: str) -> None:
    """TIES averages what agrees; the others add it up. What is dropped at random differs."""
    model = nn.Sequential(nn.Linear(12, 10))
    (pair,) = pairs(model, 3)
    rule = RULES[name]
    one, two = (delta(rule([pair] * n, rank=10), "0.weight") for n in (1, 2))
    if name in RANDOM:
        assert not torch.allclose(two, one) and not torch.allclose(two, 2 * one)
    else:
        close(two, one if name.startswith("ties") else 2 * one, name)


def test_shared_subspaces_hold_the_most_that_their_rank_can() -> None:
    """Each of U and V is the best for the other, and together they hold more than where the search begins."""
    torch.manual_seed(0)
    x = torch.randn(4, 9, 7) * torch.tensor([1.0, 5.0, 0.2, 1.0])[:, None, None]
    u, v = subspaces(x, 3)
    for q in (u, v):
        close(q.mT @ q, torch.eye(3), "orthonormal", rtol=1e-5)
    held = (u.mT @ x @ v).square().sum()
    for best, side in ((x @ v, "U"), ((u.mT @ x).mT, "V")):
        s = torch.linalg.svdvals(torch.cat(list(best), -1))
        assert held == pytest.approx(float(s[:3].square().sum()), rel=1e-4), side
    first = [torch.linalg.svd(torch.cat(list(t), -1), full_matrices=False)[0][:, :3] for t in (x, x.mT)]
    assert held > (first[0].mT @ x @ first[1]).square().sum()


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_shared_is_compress_then_merge(beta: float) -> None:
    """TIES of cores [3, 3] in the subspaces of the changes at sizes β‖Δ_t‖ + (1 − β)·mean ‖Δ_s‖."""
    model = nn.Sequential(nn.Linear(12, 10))
    ps = pairs(model, 2, 3, 2)
    x = torch.stack([delta(p, "0.weight") for p in ps])
    n = x.flatten(1).norm(dim=1)[:, None, None]
    u, v = subspaces(x / n * (beta * n + (1 - beta) * n.mean()), 3)
    net, a = M.ties(ps, density=0.5, space="shared", rank=3, beta=beta)
    assert net.plan["0.weight"].method == pf.LoRA(rank=3)
    close(net.delta(a)["0.weight"], u @ _ties(u.mT @ x @ v, 0.5) @ v.mT, "merged", rtol=1e-4)


def test_shared_at_a_rank_that_holds_all_is_lossless_and_takes_any_method() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    ps, w = pairs(model, 2, 3), [1.0, -0.5]
    none = (ps[0][0], {"0.weight": {k: torch.zeros_like(t) for k, t in ps[0][1]["0.weight"].items()}})
    merged = M.magnitude([*ps, none], [*w, 1.0], density=1.0, space="shared", rank=5)
    close(delta(merged, "0.weight"), summed(ps, w, "0.weight"), "lossless", rtol=1e-5)
    model = nn.Sequential(nn.Linear(10, 10))
    dora = pf.adapt(model, {"0.weight": pf.DoRA(rank=2)})
    mixed = [*pairs(model, 2, 3), (dora, random(dora))]
    close(
        delta(M.magnitude(mixed, density=1.0, space="shared", rank=10), "0.weight"),
        summed(mixed, [1.0] * 3, "0.weight"),
        "dense",
        rtol=1e-4,
    )
    assert M.ties(mixed, space="shared", rank=2)[0].plan["0.weight"].method == pf.LoRA(rank=2)


def test_tsv_takes_the_vectors_apart() -> None:
    """Changes whose singular vectors are orthogonal to each other's are added up; equal ones are averaged."""
    model = nn.Sequential(nn.Linear(12, 10))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
    q, p = (torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)))[0] for n in (12, 10))
    s = torch.tensor([2.0, 1.0])
    ps = [(net, {"0.weight": {"a": q[:, i : i + 2].mT, "b": p[:, i : i + 2] * s}}) for i in (0, 2)]
    close(delta(M.tsv(ps), "0.weight"), summed(ps, [1.0, 1.0], "0.weight"), "orthogonal", rtol=1e-5)
    close(delta(M.tsv([ps[0]] * 2), "0.weight"), delta(ps[0], "0.weight"), "equal", rtol=1e-5)
    kept = M.tsv(ps, keep=1)
    assert kept[0].plan["0.weight"].method == pf.LoRA(rank=2)


def test_iso_c_makes_the_singular_values_equal() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    ps, w = pairs(model, 2, 3), [1.0, -0.5]
    s = torch.linalg.svdvals(delta(M.iso_c(ps, w), "0.weight"))
    before = torch.linalg.svdvals(summed(ps, w, "0.weight"))[:5]
    torch.testing.assert_close(s[:5], before.mean().expand(5), rtol=1e-4, atol=1e-6)
    assert s[5:].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dare", "della"])
def test_what_is_kept_is_right_on_average(name: str) -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    ps = pairs(model, 3)
    rule = partial(M.dare, density=0.5) if name == "dare" else partial(M.della, density=0.5, epsilon=0.3, elect=None)
    draws = torch.stack([delta(rule(ps, rank=10, seed=i), "0.weight") for i in range(100)])
    want = delta(ps[0], "0.weight")
    assert torch.equal(draws[0], delta(rule(ps, rank=10, seed=0), "0.weight"))
    zeros = (draws.abs() < 1e-5).float().mean().item()
    assert 0.45 < zeros < 0.55
    error = (draws.mean(0) - want).abs()
    assert (error <= 5 * draws.std(0) / 100**0.5 + 1e-5).float().mean() > 0.99
    if name == "della":
        kept = (draws.abs() > 1e-5).float().mean(0)
        top, low = want.abs().argmax(-1, keepdim=True), want.abs().argmin(-1, keepdim=True)
        assert kept.gather(-1, top).mean() > 0.7 > 0.3 > kept.gather(-1, low).mean()


@pytest.mark.parametrize("space", ["core", "knots", "dense", "shared"])
def test_experts_and_convolutions_and_embeddings(space: Any) -> None:
    for kind in ("stack", "conv", "embedding", "linear_t"):
        kind = next(k for k, m in MODELS.items() if m.kind == kind)
        c, d = Case(pf.LoRA(rank=2), kind), Case(pf.LoRA(rank=1, alpha=2.0), kind)
        net = pf.adapt(c.model, {c.rule: d.method})
        ps = [(c.net, c.adapter()), (net, random(net))]
        merged = M.ties(ps, density=0.5, space=space, rank=3)
        assert merged[0].plan[SITE].method == pf.LoRA(rank=3)
        assert delta(merged).shape == delta(ps[0]).shape
        if space == "dense" and kind == "stack":  # each expert is a matrix of its own
            one = M.ties(ps, density=0.5, space=space, rank=OUT)
            x = torch.stack([delta(p)[1] for p in ps])
            close(delta(one)[1], _ties(x, 0.5), "expert")


def _ties(x: Tensor, density: float) -> Tensor:
    """The paper's words, entry by entry."""
    out = torch.zeros_like(x[0]).flatten()
    flat, keep = x.flatten(1).clone(), int(density * x[0].numel())
    for row in flat:
        row[row.abs() < row.abs().sort(descending=True).values[keep - 1]] = 0
    for i in range(out.numel()):
        sign = 1 if flat[:, i].sum() >= 0 else -1
        mine = [v for v in flat[:, i].tolist() if v * sign > 0]
        out[i] = sum(mine) / len(mine) if mine else 0
    return out.view_as(x[0])


# PEFT.


def test_the_sums_of_peft(tmp_path: Path) -> None:
    """add_weighted_adapter's "cat" and the "_svd" forms, from the same files."""
    model = by_name["llama"].build()
    config = [peft.LoraConfig(r=r, lora_alpha=5, target_modules=["q_proj", "v_proj"]) for r in (4, 4)]
    theirs = peft.get_peft_model(by_name["llama"].build(), config[0], "a")
    theirs.add_adapter("b", config[1])
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    theirs.save_pretrained(tmp_path)
    ps = [tuple(pf.load(tmp_path / n, model)) for n in ("a", "b")]
    w, x = [0.7, 1.2], tokens(2)
    forms: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
        "cat": ({}, lambda: M.linear(ps, w)),
        "svd": ({"svd_rank": 3}, lambda: M.linear(ps, w, rank=3)),
        "ties_svd": ({"svd_rank": 4, "density": 0.4}, lambda: M.ties(ps, w, density=0.4, rank=4)),
        "magnitude_prune_svd": ({"svd_rank": 4, "density": 0.4}, lambda: M.magnitude(ps, w, density=0.4, rank=4)),
    }
    for form, (options, ours) in forms.items():
        theirs.add_weighted_adapter(["a", "b"], w, form, combination_type=form, **options)
        theirs.set_adapter(form)
        net, a = ours()
        close(net.apply(a, x).logits, theirs(x).logits.detach(), form, rtol=1e-3)


def test_frequency_counts_signs_and_a_draw_goes_by_the_total() -> None:
    """(PEFT's draws are always positive, so that its result depends on the sign of what is merged.)"""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    net = pf.adapt(model, {"0.weight": pf.Full()})
    values = [[[3.0, 1.0], [1.0, -1.0]], [[-1.0, -3.0], [1.0, -2.0]], [[-1.0, 0.0], [-5.0, -3.0]]]
    ps = [(net, {"0.weight": {"diff": torch.tensor(v)}}) for v in values]
    got = delta(M.ties(ps, density=1.0, elect="frequency", rank=2), "0.weight")
    close(got, torch.tensor([[-1.0, -3.0], [1.0, -2.0]]), "frequency")
    got = delta(M.ties(ps, density=1.0, elect="total", rank=2), "0.weight")
    close(got, torch.tensor([[3.0, -3.0], [-5.0, -2.0]]), "total")


# Bad input.


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    ps = pairs(model, 2, 3)
    dora = pf.adapt(model, {"0.weight": pf.DoRA(rank=2)})
    lily = pf.adapt(model, {"0.weight": pf.Lily(rank=2)})
    other = pairs(nn.Sequential(nn.Linear(8, 6)), 2)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: M.linear([]), ValueError, "at least one"),
        (lambda: M.linear(ps[0][1]), TypeError, r"list of \(net, adapter\) pairs, not dict"),
        (lambda: M.linear(ps[0]), TypeError, r"adapters\[0\]"),
        (lambda: M.linear([ps[0], ps[0][1]]), TypeError, r"adapters\[1\]"),
        (lambda: M.linear([*ps, *other]), ValueError, "adapters 0 and 2 are of two models"),
        (lambda: M.linear(ps, [1.0]), ValueError, r"weights have shape \[1\]; give one for each of 2"),
        (lambda: M.linear(ps, [1.0, float("nan")]), ValueError, "finite"),
        (lambda: M.linear(ps, rank=7), ValueError, r"0\.weight: rank is 7.*<= 6"),
        (lambda: M.linear(ps, rank=2, energy=0.5), ValueError, "at most one"),
        (lambda: M.linear(ps, energy=2.0), ValueError, "0 < energy"),
        (lambda: M.linear([ps[0], (dora, dora.init())]), ValueError, r"0\.weight.*no factors.*rank="),
        (lambda: M.ties([ps[0], (dora, dora.init())], space="core"), ValueError, r"0\.weight.*space='knots'"),
        (lambda: M.linear([ps[0], (lily, lily.init())]), ValueError, r"0\.weight: Lily.*depends on the input"),
        (lambda: M.linear([(lily, lily.init())]), ValueError, r"0\.weight: Lily.*depends on the input"),
        (lambda: M.ties(ps), ValueError, r"0\.weight has full rank: give rank="),
        (lambda: M.ties(ps, density=0.0, rank=2), ValueError, r"density is 0\.0"),
        (lambda: M.ties(ps, space="latent"), ValueError, "choose one of"),  # type: ignore[arg-type]
        (lambda: M.ties(ps, space="shared"), ValueError, "wants rank="),
        (lambda: M.ties(ps, space="shared", energy=0.5), ValueError, "wants rank="),
        (lambda: M.ties(ps, space="shared", rank=2, beta=2.0), ValueError, "0 <= beta <= 1"),
        (lambda: M.ties(ps, space="core", beta=0.5), ValueError, "for space='shared'"),
        (lambda: M.ties(ps, elect="most"), ValueError, "'total' or 'frequency'"),  # type: ignore[arg-type]
        (lambda: M.della(ps, density=0.5, epsilon=0.6), ValueError, "epsilon < density"),
        (lambda: M.della(ps, density=0.9, epsilon=0.2), ValueError, "1 − epsilon"),
        (lambda: M.tsv(ps, keep=0), ValueError, r"0\.weight: keep is 0"),
        (lambda: M.tsv(ps, keep=4), ValueError, r"give 1 <= keep <= 3"),
    ]
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()


def test_the_base_and_the_adapters_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    ps = pairs(model, 2, 3)
    before = [{k: t.clone() for k, t in leaf.items()} for _, a in ps for leaf in a.values()]
    weight = model[0].weight.detach().clone()
    for name, rule in RULES.items():
        rule(ps, **({"space": "core"} if name in BY_ENTRY else {}))
    after = [leaf for _, a in ps for leaf in a.values()]
    assert torch.equal(model[0].weight, weight)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(before, after, strict=True) for k in x)
