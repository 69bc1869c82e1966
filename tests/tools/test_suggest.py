"""pf.suggest: PEFT's KappaTune, ranks that no others of the same total better, streams, and bad input."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from models import by_name
from peft.helpers import KappaTuneSelector, find_kappa_target_modules
from support import random, same_state, state
from torch import Tensor, nn

import peftfn as pf
from peftfn.testing import close
from peftfn.tools.singular import Sketch, Spectrum, shared_out

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")
S = pf.suggest


class Net(nn.Module):
    """Three layers of different sizes, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.norm = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 3), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.norm(torch.tanh(self.a(x))))))


def made(**fields: Any) -> tuple[pf.Adapted, list[Tensor]]:
    rules = {r"[abc]\.weight": pf.LoRA(rank=2, alpha=3.0, **fields), "norm": pf.Full()}
    g = torch.Generator().manual_seed(1)
    return pf.adapt(Net(), rules), [torch.randn(4, 7, generator=g) for _ in range(3)]


def square(out: Tensor, batch: Any) -> Tensor:
    return out.square().mean()


def ranks(net: pf.Adapted) -> dict[str, int]:
    return {n: e.method.rank for n, e in net.plan.items() if isinstance(e.method, pf.LoRA)}


# Targets.


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "vit"])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_layers_that_pefts_kappatune_finds(name: str, share: float) -> None:
    model = by_name[name].build()
    theirs = find_kappa_target_modules(model, top_p=share, show_progress=False)
    found = S.targets(model, pf.LoRA(rank=2), share=share)
    mine = found.peft()
    assert set(mine["target_modules"]) == set(theirs["target_modules"])
    assert set(mine["target_parameters"] or ()) == set(theirs["target_parameters"] or ())
    selector = KappaTuneSelector(model, show_progress=False)
    selector._compute_kappas()
    values = {f"{n}.weight": k for n, k in selector._condition_numbers.items()} | selector._parameter_condition_numbers
    assert {s.name for s in found.sites} == values.keys()
    for s in found.sites:
        assert s.value == pytest.approx(values[s.name], rel=1e-4), s.name


def test_every_way_to_choose_targets() -> None:
    model = by_name["gpt2"].build()  # Conv1D, which PEFT's helper does not look at
    everything = S.targets(model, pf.LoRA(rank=2), share=1.0)
    values = [s.value for s in everything.sites]
    assert values == sorted(values) and all(s.chosen for s in everything.sites)
    assert {s.name for s in everything.sites} >= {"transformer.h.0.attn.c_attn.weight", "lm_head.weight"}
    assert "lm_head.weight" not in {s.name for s in S.targets(model, pf.LoRA(rank=2), "all-linear", share=1.0).sites}
    three = S.targets(model, pf.LoRA(rank=2), count=3)
    bound = S.targets(model, pf.LoRA(rank=2), at_most=values[2])
    assert three.methods.keys() == bound.methods.keys() == {s.name for s in everything.sites[:3]}
    attn = S.targets(model, pf.IA3(), ["c_attn"], share=1.0)
    assert attn.methods.keys() == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    assert {s.rank for s in attn.sites} == {None}
    small = S.targets(model, pf.LoRA(rank=2), share=1.0, largest=16)
    assert "too large" in str(small) and not any(s.chosen for s in small.sites if s.value is None)


def test_the_condition_number_does_not_see_the_size_of_a_weight() -> None:
    model = Net()
    before = {s.name: s.value for s in S.targets(model, pf.LoRA(), share=1.0).sites}
    with torch.no_grad():
        model.a.weight.mul_(100)
    after = {s.name: s.value for s in S.targets(model, pf.LoRA(), share=1.0).sites}
    assert all(after[n] == pytest.approx(v, rel=1e-3) for n, v in before.items())


# Ranks.

FULL = copy.deepcopy(Net())
with torch.no_grad():
    for p in FULL.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
WAYS: dict[str, Callable[..., Any]] = {
    "gradient": lambda net, batches, **how: S.gradient_ranks(net, batches, loss=square, **how),
    "weight": lambda net, batches, **how: S.weight_ranks(net, **how),
    "change": lambda net, batches, **how: S.change_ranks(net, FULL, **how),
}


def squares(way: str, net: pf.Adapted, batches: list[Tensor]) -> dict[str, Tensor]:
    """σ² of what a way looks at, site by site, computed by hand."""
    weights = {n: w for n, w in net.model.named_parameters() if n in ranks(net)}
    if way == "gradient":
        value = sum(square(net.model(x), x) for x in batches) / len(batches)
        matrices = dict(zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True))
    else:
        matrices = weights if way == "weight" else {n: dict(FULL.named_parameters())[n] - w for n, w in weights.items()}
    found = {n: torch.linalg.svdvals(m.detach()).square() for n, m in matrices.items()}
    return {n: s / s.sum() for n, s in found.items()} if way == "weight" else found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [1, 4, 9])
def test_no_other_ranks_of_the_same_total_hold_more(way: str, budget: int) -> None:
    net, batches = made()
    found = WAYS[way](net, batches, budget=budget)
    want = squares(way, net, batches)

    def held(given: dict[str, int]) -> float:
        return sum(float(want[n][:r].sum()) for n, r in given.items())

    mine = {s.name: s.rank for s in found.sites}
    others = [c for c in itertools.product(*(range(len(v) + 1) for v in want.values())) if sum(c) == budget]
    best = max(held(dict(zip(want, c, strict=True))) for c in others)
    assert sum(mine.values()) == budget and held(mine) == pytest.approx(best, rel=1e-4)
    for s in found.sites:
        assert s.chosen == (s.rank > 0) and s.value == pytest.approx(
            float(want[s.name][: s.rank].sum() / want[s.name].sum()), rel=1e-3
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_is_the_smallest_rank_that_holds_it(way: str, energy: float) -> None:
    net, batches = made()
    want = squares(way, net, batches)
    for s in WAYS[way](net, batches, energy=energy).sites:
        shares = want[s.name].cumsum(0) / want[s.name].sum()
        assert shares[s.rank - 1] >= energy * (1 - 1e-5)
        assert s.rank == 1 or shares[s.rank - 2] < energy
    assert max(s.rank for s in WAYS[way](net, batches, energy=energy, most=2).sites) <= 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", [{}, {"rslora": True}], ids=str)
def test_the_rules_are_the_nets_with_other_ranks_and_the_same_scale(way: str, fields: dict[str, Any]) -> None:
    net, batches = made(**fields)
    before = state(net.model)
    found = WAYS[way](net, batches)
    new = pf.adapt(net.model, found)
    given = {s.name: s.rank for s in found.sites if s.rank}
    assert ranks(new) == given and sum(given.values()) == 6  # what it was
    assert {"norm.weight", "norm.bias"} <= new.plan.keys() and type(new.plan["norm.weight"].method) is pf.Full
    for n in given:
        was, now = net.plan[n].method, new.plan[n].method
        assert now.scale == pytest.approx(was.scale) and (now.rslora, now.dropout) == (was.rslora, was.dropout)
    assert torch.equal(new.apply(new.init(), batches[0]), net.model(batches[0]))
    assert same_state(state(net.model), before)


def test_a_site_without_a_rank_is_left_to_no_other_rule() -> None:
    model = Net()
    with torch.no_grad():
        model.a.weight.mul_(1e-3)
    net = pf.adapt(model, {r"[abc]\.weight": pf.LoRA(rank=1), r"^a\.|norm": pf.Full()})
    full = copy.deepcopy(model)
    with torch.no_grad():
        full.b.weight.add_(torch.randn(5, 6))
    found = S.change_ranks(net, full, budget=2)
    assert {s.name: s.rank for s in found.sites} == {"a.weight": 0, "b.weight": 2, "c.weight": 0}
    assert pf.adapt(model, found).plan.keys() == {"b.weight", "a.bias", "norm.weight", "norm.bias"}


def test_the_ranks_of_a_merged_lora_are_found_again() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2), "down_proj": pf.LoRA(rank=3), "v_proj": pf.LoRA(rank=1)})
    full = net.merge(random(net))
    assert {s.name: s.rank for s in S.change_ranks(net, full, energy=1 - 1e-6).sites} == ranks(net)
    assert {s.name: s.rank for s in S.change_ranks(net, full).sites} == ranks(net)


def test_experts_and_variants_of_lora_get_ranks() -> None:
    model = by_name["mixtral"].build()
    net = pf.adapt(model, {"experts": pf.LoRA(rank=2), "q_proj": pf.DoRA(rank=2)})
    found = S.weight_ranks(net, budget=12)
    new = pf.adapt(model, found)
    assert sum(s.rank for s in found.sites) == 12 and {type(e.method) for e in new.plan.values()} <= {pf.LoRA, pf.DoRA}
    (stack,) = (s for s in found.sites if s.name.endswith("layers.0.mlp.experts.down_proj"))
    w = dict(model.named_parameters())[stack.name]
    values = torch.stack([torch.linalg.svdvals(m.detach()).square() for m in w]).sum(0)
    assert stack.value == pytest.approx(float(values[: stack.rank].sum() / values.sum()), rel=1e-4)


def test_peft_makes_the_same_adapter_of_it() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|down_proj": pf.LoRA(rank=2, alpha=5.0)})
    found = S.weight_ranks(net, budget=7)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**found.peft()))
    made = {
        f"{n.removeprefix('base_model.model.')}.weight": (m.r["default"], m.scaling["default"])
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    new = pf.adapt(model, found)
    assert made == {n: (e.method.rank, pytest.approx(e.method.scale)) for n, e in new.plan.items()}


# Streams.


def test_batches_come_from_a_generator_and_language_models_have_a_loss() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|down_proj": pf.LoRA(rank=2)})
    ids = torch.randint(3, 20, (4, 2, 5))

    def stream() -> Iterator[dict[str, Tensor]]:
        yield from ({"input_ids": x, "labels": x} for x in ids)

    before = state(model)
    found = S.gradient_ranks(net, stream(), budget=5)
    assert sum(s.rank for s in found.sites) == 5 and same_state(state(model), before)
    assert str(found) == str(S.gradient_ranks(net, list(stream()), budget=5))


def test_gradients_are_there_without_grad_and_in_inference_mode() -> None:
    net, batches = made()
    want = S.gradient_ranks(net, batches, loss=square, budget=5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert str(S.gradient_ranks(net, batches, loss=square, budget=5)) == str(want)


def test_a_sketch_is_exact_up_to_its_rank_and_never_holds_the_sum() -> None:
    torch.manual_seed(0)
    site = pf.sites(nn.Linear(200, 300))["weight"]
    parts = [torch.randn(300, 2) @ torch.randn(2, 200) for _ in range(3)]
    whole, sketch = Sketch(site, None), Sketch(site, 8)
    for g in parts:
        whole.add(g)
        sketch.add(g)
    assert sketch.whole is None and sketch.maps is not None and sketch.products is not None
    assert sum(t.numel() for t in (*sketch.maps, *sketch.products)) == 25 * 500 < 300 * 200
    want, got = whole.spectrum(), sketch.spectrum()
    close(got.values[:6], want.values[:6], "σ²", rtol=1e-3)
    assert got.total == pytest.approx(want.total, rel=0.5) and got.values[6:].max() < 1e-6 * want.total
    small = Sketch(pf.sites(nn.Linear(20, 30))["weight"], 8)
    small.add(torch.ones(30, 20))
    assert small.maps is None and small.spectrum().total == pytest.approx(600, rel=1e-4)


def test_a_sketch_suggests_what_the_sums_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 80))
    net = pf.adapt(model, {"weight": pf.LoRA(rank=3)})
    batches = [torch.randn(2, 96) for _ in range(2)]  # gradients of rank 4
    exact, rough = (S.gradient_ranks(net, batches, loss=square, sketch=k) for k in (None, 8))
    assert {s.name: s.rank for s in exact.sites} == {s.name: s.rank for s in rough.sites}


def test_equal_values_go_to_the_earlier_component() -> None:
    spectra = {n: Spectrum(torch.tensor([2.0, 1.0, 0.0]), 3.0) for n in "ab"}
    assert shared_out(spectra, 3, None) == {"a": 2, "b": 1}
    assert shared_out(spectra, 9, None) == {"a": 2, "b": 2} and shared_out(spectra, 9, 1) == {"a": 1, "b": 1}


# Bad input.

BAD: dict[str, tuple[Callable[[pf.Adapted, list[Tensor]], Any], str]] = {
    "two ways": (lambda n, b: S.targets(n.model, pf.LoRA(), share=0.5, count=1), "share is 0.5, count is 1"),
    "share": (lambda n, b: S.targets(n.model, pf.LoRA(), share=0.0), "0 < share <= 1"),
    "share nan": (lambda n, b: S.targets(n.model, pf.LoRA(), share=float("nan")), "0 < share <= 1"),
    "count": (lambda n, b: S.targets(n.model, pf.LoRA(), count=0), "count >= 1"),
    "at_most": (lambda n, b: S.targets(n.model, pf.LoRA(), at_most=0.5), "at_most >= 1"),
    "none so low": (lambda n, b: S.targets(n.model, pf.LoRA(), at_most=1.001), r"the lowest .*, that of \w\.weight"),
    "no such layer": (lambda n, b: S.targets(n.model, pf.LoRA(), ["q_proj"]), r"\['q_proj'\] matches none"),
    "no layer": (lambda n, b: S.targets(nn.LayerNorm(3), pf.LoRA()), "no linear layer"),
    "too large": (lambda n, b: S.targets(n.model, pf.LoRA(), largest=2), "all 3 weights have a side longer than 2"),
    "meta": (lambda n, b: S.targets(nn.Linear(2, 3, device="meta"), pf.LoRA()), "weight: .* on the meta device"),
    "no stream": (lambda n, b: S.gradient_ranks(n, [], loss=square), "batches is empty"),
    "spent stream": (lambda n, b: S.gradient_ranks(n, iter(()), loss=square), "batches is empty"),
    "no loss": (lambda n, b: S.gradient_ranks(n, b), "the output has no loss"),
    "a vector": (lambda n, b: S.gradient_ranks(n, b, loss=lambda y, x: y.mean(0)), r"loss of batch 1 is \[3\]"),
    "a constant": (lambda n, b: S.gradient_ranks(n, b, loss=lambda y, x: x.sum()), "a.weight: the loss of batch 1"),
    "zero": (lambda n, b: S.gradient_ranks(n, b, loss=lambda y, x: 0 * y.sum()), "gradient is zero at every site"),
    "nan": (lambda n, b: S.gradient_ranks(n, b, loss=lambda y, x: y.sum() * float("nan")), r"\w\.weight: .*not finite"),
    "both": (lambda n, b: S.weight_ranks(n, budget=2, energy=0.5), "budget is 2 and energy is 0.5"),
    "budget": (lambda n, b: S.weight_ranks(n, budget=0), "budget >= 1"),
    "too much": (lambda n, b: S.weight_ranks(n, budget=99), "the 3 sites have 14 components"),
    "too much of each": (lambda n, b: S.weight_ranks(n, budget=7, most=2), "at most 2 each: give budget <= 6"),
    "energy": (lambda n, b: S.weight_ranks(n, energy=1.5), "0 < energy <= 1"),
    "most": (lambda n, b: S.change_ranks(n, FULL, most=0), "most >= 1"),
    "sketch": (lambda n, b: S.gradient_ranks(n, b, loss=square, most=4, sketch=2), "sketch is 2"),
    "no rank": (lambda n, b: S.weight_ranks(pf.adapt(n.model, {"weight": pf.IA3()})), "no LoRA or variant"),
    "same": (lambda n, b: S.change_ranks(n, n.model), "change is zero at every site"),
    "missing": (lambda n, b: S.change_ranks(n, {}), r"a\.weight is \[6, 7\] here, and missing in the fine-tune"),
    "shape": (lambda n, b: S.change_ranks(n, {"a.weight": torch.ones(2)}), r"and \[2\] in the fine-tune"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    net, batches = made()
    before = state(net.model)
    with pytest.raises(ValueError, match=BAD[case][1]):
        BAD[case][0](net, batches)
    assert same_state(state(net.model), before)


def test_a_method_that_changes_no_weight_and_a_weight_that_is_not_finite() -> None:
    model = Net()
    with pytest.raises(TypeError, match="no method for weights"):
        S.targets(model, pf.Bottleneck(4))
    with torch.no_grad():
        model.b.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"b\.weight: .*not finite"):
        S.targets(model, pf.LoRA())


def test_a_stream_that_fails_says_its_own_error_and_changes_nothing() -> None:
    net, batches = made()

    def breaks() -> Iterator[Tensor]:
        yield batches[0]
        raise OSError("the file ended")

    before = state(net.model)
    with pytest.raises(OSError, match="the file ended"):
        S.gradient_ranks(net, breaks(), loss=square)
    assert same_state(state(net.model), before)
