"""peftfn.optim: the groups of LoRA+ and of weight decay, and LoRA-FA's gradient, for modules and plain adapters."""

import copy
import io
from typing import Any

import peft
import pytest
import torch
from models import by_name, noise, tokens
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from support import random
from torch import Tensor, nn
from torch.func import functional_call, grad

import peftfn as pf
from peftfn import DoRA, Full, LoRA, TrainableTokens
from peftfn.testing import leaves
from peftfn.tools.optim import LoRAFA, Riemannian, decay, lora_fa, lora_plus
from peftfn.view.module import parameters_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")
RULES = {
    "q_proj": LoRA(2, alpha=3.0),
    "v_proj": DoRA(2),
    "embed_tokens": LoRA(2),
    "lm_head": TrainableTokens((3, 4)),
    "norm": Full(),
}


def llama(rules: Any = RULES) -> tuple[pf.Adapted, Any]:
    net = pf.adapt(by_name["llama"].build(), rules)
    return net, random(net)


def of(where: str, net: pf.Adapted, a: Any) -> tuple[Any, dict[str, Any], Any]:
    """(what an optimizer is given, how it is told the net, the tensors that train)."""
    if where == "module":
        m = pf.as_module(net, a)
        return m, {}, parameters_of(m)
    b = {site: {k: t.clone().requires_grad_() for k, t in leaf.items()} for site, leaf in a.items()}
    return b, {"net": net}, b


def flat(tree: Any) -> dict[int, str]:
    """tensor → "site/key", by identity."""
    return {id(t): f"{site}/{k}" for site, leaf in tree.items() for k, t in leaf.items()}


def settings(groups: Any, tree: Any) -> dict[str, tuple[float, float]]:
    """ "site/key" → (learning rate, weight decay). Every tensor is in one group, once."""
    names = flat(tree)
    found = [(names[id(t)], (g.get("lr", 0.0), g["weight_decay"])) for g in groups for t in g["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize("where", ["module", "adapter"])
def test_lora_plus(where: str) -> None:
    net, a = llama()
    given, how, tree = of(where, net, a)
    groups = lora_plus(given, 1e-3, 8.0, lr_embedding=1e-6, weight_decay=0.1, **how)
    for name, (rate, shrink) in settings(groups, tree).items():
        site, key = name.split("/")
        matrix = key in ("a", "b")
        want = 1e-6 if "embed" in site else 8e-3 if key == "b" or tree[site][key].dim() == 1 else 1e-3
        assert rate == pytest.approx(want), name
        assert shrink == (0.1 if matrix else 0.0), name
    torch.optim.AdamW(groups).step()
    without = settings(lora_plus(given, 1e-3, 8.0), tree)
    assert without["model.embed_tokens.weight/b"] == (8e-3, 0.0)


@pytest.mark.parametrize("where", ["module", "adapter"])
def test_weight_decay_leaves_rows_norms_and_magnitudes_alone(where: str) -> None:
    net, a = llama()
    given, how, tree = of(where, net, a)
    groups = decay(given, 0.1, **how)
    shrunk = {name for name, (_, value) in settings(groups, tree).items() if value}
    assert shrunk == {n for n in flat(tree).values() if n.endswith(("/a", "/b"))}
    assert len(groups) == 2
    before = {flat(tree)[id(t)]: t.detach().clone() for t in leaves(tree)}
    for t in leaves(tree):
        t.grad = torch.zeros_like(t)
    torch.optim.AdamW(groups, lr=1.0).step()
    for t in leaves(tree):
        name = flat(tree)[id(t)]
        torch.testing.assert_close(t.detach(), before[name] * (0.9 if name in shrunk else 1.0), rtol=1e-6, atol=0)


def test_chains_experts_and_expressions() -> None:
    """The parts of a chain, experts' stacks and sums are seen for what they are."""
    net = pf.adapt(by_name["mlp"].build(), {"0.weight": pf.chain(LoRA(2), pf.IA3()), "2.weight": LoRA(2)})
    given, how, tree = of("adapter", net, random(net))
    rates = settings(lora_plus(given, 1.0, 8.0, **how), tree)
    assert rates["0.weight/0.a"][0] == 1 and rates["0.weight/0.b"][0] == 8 and rates["0.weight/1.l"][0] == 8
    net = pf.adapt(by_name["mixtral"].build(), {"down_proj": DoRA(2)})
    given, how, tree = of("module", net, random(net))
    shrunk = {n.split("/")[1] for n, (_, value) in settings(decay(given, 0.1, **how), tree).items() if value}
    assert shrunk == {"a", "b"}, "one magnitude vector an expert is no matrix"
    net = pf.adapt(by_name["mlp"].build(), {"0.weight": LoRA(2)})
    m = pf.as_module(net, pf.add(random(net), pf.scale(random(net, 1), torch.tensor(2.0))))
    groups = lora_plus(m, 1.0, 8.0, weight_decay=0.1)
    kinds = sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups)
    assert kinds == [(1, 0.1, 2), (8, 0.1, 2)], "the factor of a scaling does not train"


def test_frozen_tensors_are_left_out() -> None:
    net, a = llama()
    m = pf.as_module(net, one=a, two=a)
    pf.trainable_(m, "one", False)
    with pytest.raises(ValueError, match="no tensor of the adapter requires a gradient"):
        lora_plus(m, 1e-3)
    assert sum(len(g["params"]) for g in lora_plus(m, 1e-3, name="two")) == len(leaves(a))


def peft_model(r: int = 2, alpha: int = 6) -> Any:
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "embed_tokens"], lora_dropout=0.0
    )
    return peft.get_peft_model(by_name["llama"].build(), config)


def test_lora_plus_is_peft_s() -> None:
    """The same rates and decays, tensor by tensor."""
    theirs = peft_model()
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    want = sorted((tuple(p.shape), g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"])
    net, a = llama({"q_proj|v_proj|embed_tokens": LoRA(2, alpha=6.0)})
    m = pf.as_module(net, a)
    groups = lora_plus(m, 1e-3, 8.0, lr_embedding=1e-6, weight_decay=0.1)
    got = sorted((tuple(p.shape), g["lr"], g["weight_decay"]) for g in groups for p in g["params"])
    assert got == want


def test_lora_fa_is_the_best_change_that_b_can_make() -> None:
    """s·g_B' A is the least-squares fit of the full gradient G, where g_B = s·G Aᵀ; A and all else pass."""
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": LoRA(2, alpha=5.0), "bias": Full()})
    a, x = random(net), noise(4, 8)

    def loss(a: Any) -> Tensor:
        return net.apply(a, x).square().sum()

    g = grad(loss)(a)
    got = lora_fa(net, a, g)
    full = grad(lambda w: functional_call(model, w, x).square().sum())(net.merge(a))
    for site in ("0.weight", "2.weight"):
        s = 5.0 / 2
        best = torch.linalg.lstsq(s * a[site]["a"].mT, full[site].mT).solution.mT
        torch.testing.assert_close(got[site]["b"], best, rtol=1e-3, atol=1e-4 * float(best.abs().max()))
        assert not got[site]["a"].any()
    assert got["0.bias"]["diff"] is g["0.bias"]["diff"]


@pytest.mark.parametrize("where", ["module", "adapter"])
def test_lorafa_optimizer_is_adamw_on_the_transformed_gradient(where: str) -> None:
    net, a = llama({"q_proj": LoRA(2, alpha=3.0), "norm": Full()})
    x = tokens(2)
    given, how, tree = of(where, net, a)
    optimizer = LoRAFA(given, 1e-2, weight_decay=0.1, **how)
    plain = {s: {k: t.clone().requires_grad_(k != "a") for k, t in leaf.items()} for s, leaf in a.items()}
    adam = torch.optim.AdamW(decay(plain, 0.1, net=net), 1e-2)

    def forward(given: Any) -> Tensor:
        y = given(x, labels=x) if where == "module" and given is not plain else net.apply(given, x, labels=x)
        return y.loss

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(lambda: [y := forward(given), y.backward()][0])
        adam.zero_grad()
        forward(plain).backward()
        grads = {
            s: {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in v.items()} for s, v in plain.items()
        }
        for site, leaf in lora_fa(net, plain, grads).items():
            for k, t in plain[site].items():
                if k != "a":
                    t.grad = leaf[k]
        adam.step()
    for site, leaf in tree.items():
        for k, t in leaf.items():
            if k == "a":
                assert t.grad is None and not t.requires_grad and torch.equal(t, a[site][k])
            else:
                assert not torch.equal(t, a[site][k])
                torch.testing.assert_close(t.detach(), plain[site][k].detach(), rtol=1e-4, atol=1e-6)


def test_lorafa_state_is_saved_and_restored() -> None:
    net, a = llama({"q_proj": LoRA(2)})
    modules = [pf.as_module(net, a) for _ in range(2)]
    optimizers = [LoRAFA(m, 1e-2) for m in modules]
    x = tokens(2)

    def step(m: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        m(x, labels=x).loss.backward()
        optimizer.step()

    for _ in range(2):
        step(modules[0], optimizers[0])
    buffer = io.BytesIO()
    torch.save(optimizers[0].state_dict(), buffer)
    buffer.seek(0)
    optimizers[1].load_state_dict(torch.load(buffer, weights_only=True))
    pf.copy_(modules[1], copy.deepcopy(pf.adapter_of(modules[0])))
    for m, optimizer in zip(modules, optimizers, strict=True):
        step(m, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(*(leaves(pf.adapter_of(m)) for m in modules), strict=True))


def test_lorafa_saves_no_input_of_a() -> None:
    """With A frozen, what is kept for backward no longer has the inputs of the adapted layers in it."""
    net, a = llama({"q_proj|k_proj|v_proj|o_proj": LoRA(2)})
    m, x = pf.as_module(net, a), tokens(2)

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            m(x, labels=x)
        return sum(sizes)

    before = kept()
    LoRAFA(m)
    assert kept() < before


def test_lorafa_against_peft() -> None:
    """One step from zero moments: both move B by lr along the sign of the same projected gradient."""
    net, _ = llama({"q_proj|v_proj": LoRA(2, alpha=6.0)})
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs, x = peft.get_peft_model(by_name["llama"].build(), config), tokens(2)
    a = random(net)
    named = dict(theirs.named_parameters())
    key = "base_model.model.{}.lora_{}.default.weight"
    with torch.no_grad():
        for site, leaf in a.items():
            for k, t in leaf.items():
                named[key.format(site.removesuffix(".weight"), k.upper())].copy_(t)
    optimizer = create_lorafa_optimizer(theirs, r=2, lora_alpha=6, lr=1e-2)
    (1e4 * theirs(x, labels=x).loss).backward()  # their eps is another share of the gradient than AdamW's
    optimizer.step()
    m = pf.as_module(net, a)
    ours = LoRAFA(m, 1e-2, eps=1e-6)
    (1e4 * m(x, labels=x).loss).backward()
    ours.step()
    moved = 0
    for site, leaf in pf.adapter_of(m).items():
        b = named[key.format(site.removesuffix(".weight"), "B")]
        close = (leaf["b"] - b).abs() < 1e-3
        assert close.float().mean() > 0.97, "their projection runs in bf16, so a gradient near zero may change its sign"
        moved += int((b != a[site]["b"]).sum())
    assert moved > 0


def test_riemannian_against_peft() -> None:
    """Three steps of AdamW on the preconditioned gradients; both are scaled, since the preconditioner is not."""
    net, _ = llama({"q_proj|v_proj": LoRA(2, alpha=6.0)})
    x = tokens(2)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs, a = peft.get_peft_model(by_name["llama"].build(), config), random(net)
    named, key = dict(theirs.named_parameters()), "base_model.model.{}.lora_{}.default.weight"
    with torch.no_grad():
        for site, leaf in a.items():
            for k, t in leaf.items():
                named[key.format(site.removesuffix(".weight"), k.upper())].copy_(t)
    optimizer = create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-3, reg=0.1, weight_decay=0.0)
    m = pf.as_module(net, a)
    ours = Riemannian(m, 1e-3, damping=0.1)
    for _ in range(3):
        for model, o in ((theirs, optimizer), (m, ours)):
            o.zero_grad()
            model(x, labels=x).loss.backward()
            o.step()
    for site, leaf in pf.adapter_of(m).items():
        for k, t in leaf.items():
            want = named[key.format(site.removesuffix(".weight"), k.upper())]
            torch.testing.assert_close(t, want.detach(), rtol=1e-3, atol=2e-5)


def test_errors() -> None:
    net, a = llama()
    given, how, _ = of("adapter", net, a)
    for make, match in [
        (lambda: lora_plus(given, 0.0), "lr is 0.0"),
        (lambda: lora_plus(given, 1e-3, -1), "ratio is -1"),
        (lambda: lora_plus(given, 1e-3, lr_embedding=1e-6), "pass net=net"),
        (lambda: lora_plus(a, 1e-3), "requires_grad_"),
        (lambda: decay(given, 0.1), "pass net=net"),
        (lambda: LoRAFA(given), "pass net=net"),
        (lambda: LoRAFA(of("module", *llama({"norm": Full()}))[0]), "has no LoRA"),
        (lambda: Riemannian(given), "Riemannian.*pass net=net"),
        (lambda: Riemannian(given, damping=-1.0, **how), "damping >= 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(KeyError, match="lacks"):
        decay({"model.norm.weight": given["model.norm.weight"]}, 0.1, **how)


def test_tied_rows_do_not_decay_either() -> None:
    """TiedTokens' rows stand in the rule's bank, and are weights as TrainableTokens' are."""
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    net = pf.adapt(model, {"embed|head": pf.TiedTokens((3, 4))})
    adapter = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in net.init().items()}
    (rows,) = [t for leaf in adapter.values() for t in leaf.values()]
    decays = {g["weight_decay"] for g in decay(adapter, 0.1, net=net) for t in g["params"] if t is rows}
    assert decays == {0.0}


@pytest.mark.parametrize("as_tree", [True, False])
def test_vb_lora_has_a_rate_for_its_bank_and_one_for_its_logits(as_tree: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    net = pf.adapt(model, {r"0\.weight": pf.VBLoRA(rank=2, vectors=5, length=2), "1": pf.Full()})
    a = net.init()
    for t in pf.leaves(a):
        t.requires_grad_()
    m = a if as_tree else pf.as_module(net, a)
    groups = pf.optim.vb_lora(m, weight_decay=0.1, net=net if as_tree else None)
    shapes = {(g["lr"], g["weight_decay"]): sorted(tuple(t.shape) for t in g["params"]) for g in groups}
    assert shapes == {
        (1e-3, 0.1): [(5, 2)], (1e-2, 0.0): [(2, 4, 5), (3, 2, 5)], (1e-4, 0.1): [(4, 6)], (1e-4, 0.0): [(4,)]
    }  # fmt: skip
    torch.optim.AdamW(groups)
    other = pf.adapt(model, {"0": pf.Full()})
    with pytest.raises(ValueError, match="has no VBLoRA"):
        pf.optim.vb_lora(pf.as_module(other, other.init()))
    with pytest.raises(ValueError, match="pass net=net"):
        pf.optim.vb_lora(a)
    with pytest.raises(ValueError, match="lr_bank is 0"):
        pf.optim.vb_lora(a, lr_bank=0, net=net)
