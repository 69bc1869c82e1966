"""pf.spectrum: its figures are those of the dense change, for every method that has one."""

import json
import math
from dataclasses import astuple
from typing import Any

import pytest
import torch
from models import by_name
from support import FIRST, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfn as pf
from peftfn.testing import MODELS, Case
from peftfn.tools import spectrum as module

MERGE = [m for m in FIRST if m.mergeable]


def dense(delta: Tensor) -> tuple[float | None, ...]:
    """The five figures by their definitions, of a matrix [out, in]."""
    m = delta.detach().double()
    s = torch.linalg.svdvals(m)
    if not m.any():
        return 0.0, 0.0, None, None, None
    p = s[s > 0] / s.sum()
    d = m - m.mean()
    kurtosis = float((d**4).mean() / (d**2).mean() ** 2)
    return float(s[0]), float(m.norm()), float(s[0] ** 2 / (s**2).sum()), -float((p * p.log()).sum()), kurtosis


def of_one(change: Tensor, **fields: float) -> pf.SpectrumSite:
    """The figures of a change, which a LoRA of full rank makes."""
    out, in_ = change.shape
    net = pf.adapt(nn.Sequential(nn.Linear(in_, out)), {"0.weight": pf.LoRA(rank=min(out, in_))})
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    (site,) = pf.spectrum(net, {"0.weight": {"a": vh, "b": u * s}})
    return site


@pytest.mark.parametrize("method", MERGE, ids=str)
def test_the_figures_are_those_of_the_dense_change(method: pf.Method) -> None:
    c = Case(method)
    a = c.adapter()
    (site,) = pf.spectrum(c.net, a)
    assert site.name == c.site
    want = dense(c.net.delta(a)[c.site])
    # the entropy counts singular values that rounding makes of none: hence its bound
    for got, expected, bound in zip(astuple(site)[1:], want, (1e-5, 1e-5, 1e-5, 1e-4, 1e-4), strict=True):
        assert got == (None if expected is None else pytest.approx(expected, rel=bound, abs=bound))


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("other", "dense")])
def test_at_every_kind_of_matrix(kind: str) -> None:
    c = Case(pf.LoRA(rank=2), kind)
    a = c.adapter()
    delta = c.net.plan[c.site].site.canonical(c.net.delta(a)[c.site])
    each = {c.site: delta} if delta.dim() == 2 else {f"{c.site}[{e}]": d for e, d in enumerate(delta)}
    found = pf.spectrum(c.net, a)
    assert [s.name for s in found] == list(each)
    for s in found:
        assert astuple(s)[1:] == pytest.approx(dense(each[s.name]), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 0.5, -3.0, 1e4])
def test_the_shape_does_not_change_with_the_size(scale: float) -> None:
    for method in (pf.LoRA(rank=3), pf.Full(), pf.LoHa(rank=2)):
        c = Case(method)
        a = c.adapter()
        (one,), (other,) = pf.spectrum(c.net, a), pf.spectrum(c.net, pf.scale(a, scale))
        assert astuple(other)[3:] == pytest.approx(astuple(one)[3:], rel=1e-4)
        assert astuple(other)[1:3] == pytest.approx([abs(scale) * x for x in (one.largest, one.norm)], rel=1e-4)


def test_what_the_figures_mean() -> None:
    g = torch.Generator().manual_seed(0)
    one = of_one(torch.outer(torch.randn(30, generator=g), torch.randn(40, generator=g)))
    assert one.largest == pytest.approx(one.norm, rel=1e-5)
    assert one.concentration == pytest.approx(1, abs=1e-6) and 0 <= one.entropy < 1e-4
    even = of_one(torch.linalg.qr(torch.randn(40, 30, generator=g))[0])
    assert even.concentration == pytest.approx(1 / 30, rel=1e-4) and even.entropy == pytest.approx(math.log(30))
    assert of_one(torch.randn(200, 300, generator=g)).kurtosis == pytest.approx(3, abs=0.1)
    spike = torch.zeros(30, 40)
    spike[3, 5] = 2.0  # one of n entries: m₄/m₂² = (1 − 3p + 3p²)/(p(1 − p)), p = 1/n
    assert of_one(spike).kurtosis == pytest.approx(1200 - 2 + 1 / 1199, rel=1e-3)


def test_a_rank_one_adapter_has_one_direction() -> None:
    for method in (pf.LoRA(rank=1), pf.LoRA(rank=1, alpha=7.0)):
        net = pf.adapt(by_name["llama"].build(), {"[qv]_proj": method})
        for site in pf.spectrum(net, random(net)):
            assert site.entropy == 0 and site.concentration == pytest.approx(1, abs=1e-12)


def test_no_change_and_equal_entries_have_no_shape() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
    (site,) = found = pf.spectrum(net, net.init())
    assert astuple(site)[1:] == (0, 0, None, None, None) and " -" in str(found)
    same = {"0.weight": {"a": torch.ones(2, 8), "b": torch.full((4, 2), 0.3)}}
    (site,) = pf.spectrum(net, same)
    assert site.kurtosis is None and site.concentration == pytest.approx(1) and site.entropy < 1e-6


@pytest.mark.parametrize("block", [1, 20, 31])
def test_blocks_give_what_the_whole_gives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c, d = Case(pf.LoRA(rank=2)), Case(pf.Full())
    whole = [pf.spectrum(k.net, k.adapter())[0] for k in (c, d)]
    monkeypatch.setattr(module, "BLOCK", block)
    for k, want in zip((c, d), whole, strict=True):
        assert astuple(pf.spectrum(k.net, k.adapter())[0])[1:] == pytest.approx(astuple(want)[1:], rel=1e-12)


def test_the_product_of_factors_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        size = 0  # in bytes

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                self.size = max(self.size, t.untyped_storage().nbytes() if isinstance(t, Tensor) else 0)
            return out

    model = nn.Sequential(nn.Linear(80, 60, bias=False))
    model[0].weight = nn.Parameter(torch.ones(()).expand(60, 80))  # of no size, so that what is made is seen
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
    a = random(net)
    monkeypatch.setattr(module, "BLOCK", 160)
    with Largest() as largest:
        pf.spectrum(net, a)
    assert 0 < largest.size <= 160 * 8
    with Largest() as largest:
        net.delta(a)
    assert largest.size == 60 * 80 * 4


def test_a_report_prints_and_is_json_and_leaves_out_what_is_no_matrix() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2), "norm": pf.Full()})
    found = pf.spectrum(net, random(net))
    assert [s.name for s in found] == [n for n in net.plan if "q_proj" in n]
    assert str(found).splitlines()[0].split() == ["site", "σ₁", "‖Δ‖", "concentration", "entropy", "kurtosis"]
    assert json.loads(json.dumps(found.json()))[0]["name"] == found[0].name
    assert isinstance(found[:1], pf.SpectrumReport) and list(found[:1]) == [found[0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [pf.LoRA(rank=2), pf.Full(), pf.LoHa(rank=2)], ids=str)
def test_what_is_not_finite_is_named(method: pf.Method, value: float) -> None:
    c = Case(method)
    a = c.adapter()
    key = next(iter(a[c.site]))
    a[c.site][key] = a[c.site][key].clone().fill_(value)
    with pytest.raises(ValueError, match=r"^layer\.weight: the change has values that are not finite"):
        pf.spectrum(c.net, a)


@pytest.mark.parametrize("method", [m for m in FIRST if not m.mergeable], ids=str)
def test_a_method_without_a_change_of_the_weight_is_named(method: pf.Method) -> None:
    c = Case(method)
    with pytest.raises(ValueError, match=r"^layer\.weight: .* depends on the input"):
        pf.spectrum(c.net, c.adapter())
