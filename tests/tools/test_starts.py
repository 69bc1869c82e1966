"""pf.starts: what each start is, that it leaves the base alone, PEFT's where PEFT is right, and bad input."""

import copy
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from support import same_state, state
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.testing import close

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`", "ignore:Cor", "ignore:Sparse invariant checks"
)
S = pf.starts


class Net(nn.Module):
    """Two layers share an input, a third has another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = nn.Linear(12, 10), nn.Linear(12, 8), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x))) + self.k(x)[..., :6]


def made(rank: int = 2, **fields: Any) -> tuple[pf.Adapted, list[Tensor]]:
    net = pf.adapt(Net(), {r"[qko]\.weight": pf.LoRA(rank=rank, alpha=3.0, **fields)})
    g = torch.Generator().manual_seed(1)
    scale = torch.logspace(0.5, -1.5, 12)
    return net, [torch.randn(4, 9, 12, generator=g) * scale + 1 for _ in range(3)]


def square(out: Tensor, batch: Any) -> Tensor:
    return out.square().mean()


STARTS: dict[str, Callable[[Any, Any], Any]] = {
    "orthogonal": lambda net, batches: S.orthogonal(net),
    "eva": lambda net, batches: S.eva(net, batches),
    "corda": lambda net, batches: S.corda(net, batches),
    "corda, instruction": lambda net, batches: S.corda(net, batches, keep="instruction"),
    "lora_ga": lambda net, batches: S.lora_ga(net, batches, loss=square),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_the_identity_and_leaves_the_base_alone(name: str) -> None:
    net, batches = made(dropout=0.3)
    before, modes = state(net.model), net.model.training
    new, a = STARTS[name](net, iter(batches))
    assert same_state(before, state(net.model)) and net.model.training == modes
    assert not any(m._forward_pre_hooks for m in net.model.modules())
    new.plan.check(a)
    net.model.eval()
    torch.testing.assert_close(new.apply(a, batches[0]), net.model(batches[0]), rtol=0, atol=1e-6)
    g = torch.func.grad(lambda a: new.apply(a, batches[0]).square().sum())(a)
    assert all(any(bool(t.any()) for t in leaf.values()) for leaf in g.values())
    for leaf in a.values():
        assert (leaf["a"] != 0).any() and (leaf["b"] != 0).any() == (name != "eva")


@pytest.mark.parametrize("name", [n for n in STARTS if n != "orthogonal"])
def test_a_trained_one_is_what_peft_reads(name: str, tmp_path: Path) -> None:
    """Converted as PEFT converts it: to a LoRA of twice the rank."""
    model, x = by_name["llama"].build(), tokens(2)
    net = pf.adapt(model, {"q_proj|v_proj": pf.LoRA(rank=2, alpha=3.0)})
    batches = [{"input_ids": tokens(2), "attention_mask": torch.ones_like(x), "labels": x} for _ in range(2)]
    if name == "lora_ga":
        new, a = S.lora_ga(net, batches)
    else:
        new, a = STARTS[name](net, batches)
    a = {n: {k: t + 0.1 * torch.randn_like(t) for k, t in leaf.items()} for n, leaf in a.items()}
    pf.save(tmp_path / "native", new, a)
    again, b = pf.load(tmp_path / "native", model)
    assert torch.equal(again.apply(b, x).logits, new.apply(a, x).logits)
    if name != "eva":
        with pytest.raises(ValueError, match=r"PEFT has no OffsetLoRA.*to_lora"):
            pf.save(tmp_path / "no", new, a, format="peft")
    pf.save(tmp_path / "peft", *pf.to_lora(new, a), format="peft")
    theirs = peft.PeftModel.from_pretrained(by_name["llama"].build(), tmp_path / "peft").eval()
    close(theirs(x).logits.detach(), new.apply(a, x).logits, name)


# What each is.


def test_orthogonal_factors() -> None:
    net, _ = made(rank=4)
    _, a = S.orthogonal(net, seed=3)
    for leaf in a.values():
        assert (leaf["b"] @ leaf["a"]).abs().max() < 1e-6 * leaf["a"].abs().max()
        assert torch.linalg.matrix_rank(leaf["a"]) == torch.linalg.matrix_rank(leaf["b"]) == 2
    again, other = S.orthogonal(net, seed=3)[1], S.orthogonal(net, seed=4)[1]
    assert torch.equal(a["q.weight"]["a"], again["q.weight"]["a"])
    assert not torch.equal(a["q.weight"]["a"], other["q.weight"]["a"])


def test_eva_finds_the_principal_directions() -> None:
    """Of all inputs at once, by a decomposition of the whole."""
    net, batches = made(rank=3)
    new, a = S.eva(net, iter(batches), rho=1.0)
    assert {e.method.rank for e in new.plan.values()} == {3} and new.plan.keys() == net.plan.keys()
    x = torch.cat([b.reshape(-1, 12) for b in batches])
    v = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    for name in ("q.weight", "k.weight"):
        close((a[name]["a"] @ v.mT).abs(), torch.eye(3), name, rtol=2e-2)
    assert torch.equal(a["q.weight"]["a"], a["k.weight"]["a"])


def test_eva_gives_the_ranks_where_they_explain_most() -> None:
    net, batches = made(rank=3)
    batches = [b * torch.tensor([5.0] + [0.01] * 11) for b in batches]  # one direction explains q's and k's inputs
    new, a = S.eva(net, iter(batches), rho=2.0)
    ranks = {n: e.method.rank for n, e in new.plan.items()}
    assert sum(ranks.values()) == 9 and max(ranks.values()) <= 6 and len(set(ranks.values())) > 1
    assert all(a[n]["a"].shape[0] == r and new.plan[n].method.scale == pytest.approx(1.0) for n, r in ranks.items())
    h = torch.tanh(net.model.q(torch.cat([b.reshape(-1, 12) for b in batches]))).detach()
    x = torch.cat([b.reshape(-1, 12) for b in batches])
    shares = {}
    for n, t in {"q.weight": x, "k.weight": x, "o.weight": h}.items():
        s = torch.linalg.svdvals(t - t.mean(0)).square()
        shares[n] = (s / s.sum())[: min(6, len(s))]
    best = sorted(((float(r), n) for n, rs in shares.items() for r in rs), reverse=True)[:9]
    assert ranks == {n: sum(m == n for _, m in best) for n in ranks}


def test_a_mask_leaves_tokens_out() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2)})
    ids, mask = tokens(4), torch.ones_like(tokens(4))
    mask[:, 3:] = 0
    other = ids.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 24
    one, two = (S.eva(net, [{"input_ids": i, "attention_mask": mask}], rho=1.0)[1] for i in (ids, other))
    free = S.eva(net, [{"input_ids": other}], rho=1.0)[1]
    name = "model.layers.0.self_attn.q_proj.weight"
    close(one[name]["a"], two[name]["a"], "masked")
    assert not torch.allclose(one[name]["a"].abs(), free[name]["a"].abs(), atol=1e-3)


@pytest.mark.parametrize(("keep", "theirs"), [("knowledge", "kpm"), ("instruction", "ipm")])
def test_corda_is_pefts(keep: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT takes dataclass from attrs, on which it does not depend
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # type: ignore[arg-type]
    preprocess_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
    net, batches = made(rank=2)
    batches = [b[:1] for b in batches]  # PEFT takes one row at a time
    _, a = S.corda(net, batches, keep=keep)
    model = Net()
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q", "k", "o"], "init_lora_weights": "corda"}
    config = peft.LoraConfig(**options, corda_config=peft.tuners.lora.config.CordaConfig(corda_method=theirs))
    preprocess_corda(model, config, run_model=lambda: [model(b) for b in batches])
    wrapped = peft.get_peft_model(model, config)
    for n, leaf in a.items():
        layer = wrapped.base_model.model.get_submodule(n.removesuffix(".weight"))
        want = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        close(leaf["b"] @ leaf["a"], want.detach(), n, rtol=2e-3)


def test_lora_ga_starts_at_the_gradient() -> None:
    net, batches = made(rank=2)
    new, a = S.lora_ga(net, batches, loss=square, gamma=4.0)
    params = {n: p.detach() for n, p in net.model.named_parameters()}
    grads = [torch.func.grad(lambda w, b=b: square(functional_call(net.model, w, (b,)), b))(params) for b in batches]
    for n, leaf in a.items():
        g = torch.stack([g[n] for g in grads]).mean(0)
        u, _, vh = torch.linalg.svd(g)
        size = g.shape[0] ** 0.25 / 2
        close((leaf["a"] @ vh[:2].mT).abs(), size * torch.eye(2), n)
        close((leaf["b"].mT @ u[:, 2:4]).abs(), size * torch.eye(2), n)
        entry = new.plan[n]
        assert torch.equal(entry.frozen["a0"], leaf["a"]) and entry.method.scale == pytest.approx(1.5)


def test_lora_one_is_a_step_of_gradient_descent() -> None:
    net, batches = made(rank=2)
    net.model.eval()
    same, a = S.lora_one(net, batches[:1], loss=square, gamma=1e4)
    assert same is net
    before, after = square(net.model(batches[0]), None), square(net.apply(a, batches[0]), None)
    assert after < before
    g = torch.func.grad(lambda w: square(functional_call(net.model, w, (batches[0],)), None))(
        {n: p.detach() for n, p in net.model.named_parameters()}
    )
    for n, leaf in a.items():
        u, s, vh = torch.linalg.svd(g[n], full_matrices=False)
        close(leaf["b"] @ leaf["a"], -u[:, :2] * s[:2] @ vh[:2] / (s[0] * 1e4), n)


def test_loftq_comes_closer_to_the_weights() -> None:
    net, batches = made(rank=2)

    def quantise(w: Tensor) -> Tensor:
        return (w * 4).round() / 4

    def error(weights: Any, a: Any) -> float:
        d = net.delta(a)
        return sum(float((net.weights[n] - weights[n] - d[n]).norm()) for n in d)

    plain = {n: quantise(net.weights[n]) for n in net.plan}
    errors = [error(plain, net.init())]
    for steps in (1, 5):
        weights, a = S.loftq(net, quantise, steps=steps)
        assert all(torch.equal(w, quantise(w)) for w in weights.values())
        errors.append(error(weights, a))
    assert errors[0] > errors[1] > errors[2]
    weights, a = S.loftq(net, quantise)
    net.model.eval()
    want = net.model(batches[0])
    off = [(net.apply(b, batches[0], params=w) - want).norm() for w, b in ((plain, net.init()), (weights, a))]
    assert off[1] < off[0]
    coarse = Net()
    coarse.load_state_dict({**coarse.state_dict(), **plain})
    given = pf.adapt(coarse, {r"[qko]\.weight": pf.LoRA(rank=2, alpha=3.0)})
    held, b = S.loftq(given, {n: net.weights[n] for n in net.plan})
    assert all(torch.equal(held[n], plain[n]) for n in plain)
    close(given.delta(b)["q.weight"], net.delta(a)["q.weight"], "from the full weights")


def test_other_rules_stay_and_bad_input_is_named() -> None:
    net, batches = made()
    mixed = pf.adapt(Net(), {"q.weight": pf.LoRA(rank=2), "bias": pf.Full(), "o.weight": pf.VeRA(rank=2)})
    new, _ = S.corda(mixed, batches)
    assert type(new.plan["q.weight"].method) is pf.OffsetLoRA and new.plan["o.weight"].method == pf.VeRA(rank=2)
    kept = mixed.plan["o.weight"].frozen
    assert kept and all(new.plan["o.weight"].frozen[k] is t for k, t in kept.items())
    table = pf.adapt(nn.Sequential(nn.Embedding(9, 8)), {"0": pf.LoRA(rank=2)})

    def few() -> Iterator[Tensor]:
        yield batches[0][:1, :2]

    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.k(x)

    lost = pf.adapt(Unused(), {r"[qko]\.weight": pf.LoRA(rank=2)})
    odd = pf.adapt(Net(), {r"q\.weight": pf.LoRA(rank=3)})
    biased = pf.adapt(Net(), {r"q\.weight": pf.LoRA(rank=2, lora_bias=True)})
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: S.eva(net, []), "eva: batches is empty"),
        (lambda: S.eva(net, few()), r"eva: q\.weight: 2 tokens are too few for 4"),
        (lambda: S.eva(net, batches, rho=0.5), "rho is 0.5"),
        (lambda: S.eva(table, [torch.zeros(2, 3).long()]), r"0\.weight is a embedding"),
        (lambda: S.eva(pf.adapt(Net(), {"q": pf.Full()}), batches), "has no LoRA"),
        (lambda: S.eva(lost, batches), r"q\.weight: its layer has no input in batch 1"),
        (lambda: S.corda(net, batches, keep="all"), "'knowledge' or 'instruction'"),
        (lambda: S.corda(net, [batches[0] / 0]), "not finite"),
        (lambda: S.corda(biased, batches), r"q\.weight.*lora_bias=False"),
        (lambda: S.lora_ga(net, batches), "no loss"),
        (lambda: S.lora_ga(net, [], loss=square), "batches is empty"),
        (lambda: S.lora_ga(net, batches, loss=square, gamma=0), "gamma is 0"),
        (lambda: S.lora_ga(made(rank=4)[0], batches, loss=square), r"o\.weight: rank is 4.*<= 3"),
        (lambda: S.lora_one(lost, batches, loss=square), r"q\.weight: the loss of batch 1 does not depend on it"),
        (lambda: S.orthogonal(odd), r"q\.weight: rank is 3.*even"),
        (lambda: S.loftq(net, torch.round, steps=0), "steps is 0"),
        (lambda: S.loftq(net, {}), r"q\.weight: its full weight is missing"),
        (lambda: S.loftq(net, dict(net.weights), steps=2), "steps is 2"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


# SHiRA's places.


def largest(site: str, w: Tensor) -> Tensor:
    return w.abs() >= w.abs().flatten().topk(sum(w.shape)).values[-1]


def test_sparse_changes_the_places_of_its_mask_and_no_others(tmp_path: Path) -> None:
    """And files in both formats keep them; PEFT reads ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    net, a = pf.starts.sparse(pf.adapt(model, {"weight": pf.SHiRA(rank=1)}), largest)
    assert all(not t.any() for t in pf.leaves(a))
    a = {n: {"v": torch.randn_like(leaf["v"])} for n, leaf in a.items()}
    for name, change in net.delta(a).items():
        assert torch.equal(change != 0, largest(name, net.weights[name]))
    x = torch.randn(2, 8)
    y = net.apply(a, x)
    pf.save(tmp_path / "ours", net, a)
    pf.save(tmp_path / "peft", net, a, format="peft")
    for folder in ("ours", "peft"):
        again, b = pf.load(tmp_path / folder, model)
        assert torch.equal(again.apply(b, x), y)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")
    torch.testing.assert_close(theirs(x), y)


def test_pefts_files_with_a_mask_of_ones_own_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.warns(UserWarning, match="mask_type"):
        config = peft.ShiraConfig(r=1, target_modules=["0", "1"], mask_type="largest")
    config.mask_fn = lambda layer, r, **_: largest("", layer.weight).to(layer.weight)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_()
    theirs.save_pretrained(tmp_path)
    net, a = pf.load(tmp_path, model)
    x = torch.randn(2, 8)
    torch.testing.assert_close(net.apply(a, x), theirs(x))


def test_masks_that_do_not_fit() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"weight": pf.SHiRA(rank=1)})
    for mask in (lambda n, w: w > -9, lambda n, w: largest(n, w).float(), lambda n, w: largest(n, w).T):
        with pytest.raises(ValueError, match=r"sparse: 0\.weight: the mask has .*wants 14 of \[6, 8\]"):
            pf.starts.sparse(net, mask)
    with pytest.raises(ValueError, match="no SHiRA"):
        pf.starts.sparse(pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"weight": pf.LoRA(1)}), largest)


def test_a_start_keeps_what_else_the_net_was_told() -> None:
    """Which modules are rematerialised, and through which rows are followed."""
    net = pf.adapt(Net(), {"weight": pf.LoRA(rank=2)}, routed=["q"])
    net = pf.Adapted(net.model, net.plan, ["o"], net.routed)
    batches = [torch.randn(16, 12)]
    loss = lambda y, *_: y.square().mean()  # noqa: E731
    for made, _ in (S.corda(net, batches), S.eva(net, batches), S.lora_ga(net, batches, loss=loss)):
        assert (made.again, made.routed) == (("o",), net.routed)
