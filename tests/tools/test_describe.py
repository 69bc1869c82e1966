"""`pf.describe`: what it lists is what `adapt` can take, on every model of the tests."""

import pytest
import torch
from models import CASES, Tied, by_name
from torch import nn

import peftfn as pf


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_is_there_once_with_its_shape_and_ties(case) -> None:
    model = case.build()
    found, params = pf.describe(model), dict(model.named_parameters(remove_duplicate=False))
    assert [n for s in found for n in (s.name, *s.aliases)] != []
    assert sorted(n for s in found for n in (s.name, *s.aliases)) == sorted(params)
    for s in found:
        p = params[s.name]
        assert (s.shape, s.dtype, s.device, s.numel) == (tuple(p.shape), p.dtype, p.device, p.numel())
        assert all(params[n] is p for n in (*s.aliases, *s.tied))
        same = {n for n, q in params.items() if q is p}
        assert same == {n for t in found if t.name in (s.name, *s.tied) for n in (t.name, *t.aliases)}
    assert found.numel == sum(p.numel() for p in model.parameters())
    table = str(found)
    assert table.splitlines()[-1] == f"{len(found):,} sites, {found.numel:,} parameters"
    assert all(s.kind in table for s in found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pattern_finds_what_a_rule_finds(case) -> None:
    model = case.build()
    net = pf.adapt(model, {case.linear: pf.Full()})
    assert [s.name for s in pf.describe(model, case.linear)] == list(net.plan)
    assert [s.kind for s in pf.describe(model, case.linear)] == [e.site.kind for e in net.plan.values()]


def test_tied_and_shared_are_told_apart() -> None:
    embed, *_, head = pf.describe(Tied())
    assert (embed.name, embed.kind, embed.tied) == ("embed.weight", "embedding", ("head.weight",))
    assert (head.name, head.kind, head.tied) == ("head.weight", "linear", ("embed.weight",))
    assert "embed.weight  embedding  24×8   float32  head.weight" in str(pf.describe(Tied()))
    shared = pf.describe(by_name["shared"].build())
    assert (shared[0].name, shared[0].aliases, shared[0].tied) == ("first.weight", ("second.weight",), ())
    assert "first.weight (= second.weight)" in str(shared)


def test_layers_that_are_alike_share_a_line() -> None:
    layers = [nn.Linear(4, 4, bias=False) for _ in range(12)]
    layers[5] = nn.Linear(4, 8, bias=False)
    layers[7].half()
    lines = str(pf.describe(nn.ModuleDict({"layers": nn.ModuleList(layers)}))).splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["layers.[0-4,6,8-11].weight", "linear", "4×4", "float32"],
        ["layers.5.weight", "linear", "8×4", "float32"],
        ["layers.7.weight", "linear", "4×4", "float16"],
    ]


class Packed(nn.Module):
    """A quantised layer without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("qweight", torch.ones(6, 8, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.to(x.dtype).T


def test_quantised_layers_are_listed_as_such() -> None:
    one, *_ = found = pf.describe(nn.ModuleDict({"packed": Packed(), "norm": nn.LayerNorm(6)}))
    assert (one.name, one.kind, one.shape, one.quantised) == ("packed.weight", "linear", (6, 8), True)
    assert "packed.weight  linear, quantised  6×8    float32" in str(found)


def test_it_reads_no_value_and_takes_meta_models() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.LayerNorm(10**6))
    found = pf.describe(model)
    assert [s.device.type for s in found] == ["meta"] * 4
    assert found.numel == 10**12 + 3 * 10**6
    assert found == pf.describe(model)
    assert found[1:] == pf.describe(model)[1:] != found


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'\(' is not a valid regular expression"):
        pf.describe(Tied(), "(")
    none = pf.describe(Tied(), "nothing")
    assert len(none) == 0 and str(none).startswith("0 sites: 'nothing' matches no parameter; ")
    assert str(pf.describe(nn.Linear(2, 2), "wieght")) == "0 sites: 'wieght' matches no parameter; near: weight"
    assert str(pf.describe(nn.ReLU(), "weight")) == "0 sites"
    with pytest.raises(ValueError, match="not initialised yet"):
        pf.describe(nn.LazyLinear(3))
