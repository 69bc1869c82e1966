"""What the laws do not say of single methods: training aids, parity with PEFT beside the format, and their size."""

import ast
import copy
import dataclasses
import io
import pickle
import re
import statistics
import tokenize
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.oft.layer import MultiplicativeDropoutLayer
from support import random
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf
from peftfn.core.method import registry
from peftfn.methods.parts.allocation import Allocation, allocate
from peftfn.methods.parts.wavelets import low_pass
from peftfn.methods.weights import hra, kasa, monteclora
from peftfn.methods.weights.adalora import orthogonality
from peftfn.methods.weights.tlora import masked, rank_mask
from peftfn.testing import shaken

FOLDER = Path(pf.__file__).parent / "methods" / "weights"
INIT = FOLDER.parent / "__init__.py"


def lines_of_code(path: Path) -> int:
    """Lines that are no blank, comment or docstring, and not in the table of PEFT's names, `peft = …`."""
    text = path.read_text()

    def counts(node: ast.AST) -> bool:
        if isinstance(node, ast.Assign):
            return getattr(node.targets[0], "id", "") != "peft"
        return not (isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str))

    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and not counts(node)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in blank]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - strings)


def test_a_method_is_a_small_file() -> None:
    sizes = {p.stem: lines_of_code(p) for p in FOLDER.glob("*.py") if p.stem != "__init__"}
    assert len(sizes) >= 49
    assert statistics.median(sizes.values()) <= 50, sorted(sizes.items(), key=lambda item: item[1])
    assert max(sizes.values()) <= 80, sorted(sizes.items(), key=lambda item: item[1])[-5:]


def test_a_method_is_one_file_and_one_line() -> None:
    """docs/adding_a_method.md says so: everything but the file and its import is read from the registry."""
    line = r"^from peftfn\.methods\.(\w+)\.(\w+) import (\w+) as \3$"
    imported = [(f"{room}/{file}", name) for room, file, name in re.findall(line, INIT.read_text(), flags=re.M)]
    folders = [p for p in INIT.parent.iterdir() if (p / "__init__.py").exists() and p.name != "parts"]
    files = [f"{folder.name}/{p.stem}" for folder in folders for p in folder.glob("*.py") if p.stem != "__init__"]
    assert sorted({file for file, _ in imported}) == sorted(files)
    ours = {n for n, c in registry.items() if c.__module__.startswith("peftfn.methods")}
    assert {name for _, name in imported} == ours <= set(pf.__all__)
    elsewhere = [p for p in (INIT.parents[1] / "__init__.py", INIT) if re.search(r"\"(LoRA|VeRA)\"", p.read_text())]
    assert not elsewhere, "a second list of names"


# What a class must derive from, and PEFT's words.


def test_a_method_derives_from_a_family() -> None:
    with pytest.raises(TypeError, match=r"Plain derives from Method.*derive from peftfn\.Weight, class Plain\(peftfn"):

        class Plain(pf.Method):
            def delta(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
                return p["d"]

    assert "Plain" not in registry
    assert issubclass(pf.LoRA, pf.Weight)
    assert pf.LoRA.overrides("bias")
    assert not pf.VeRA.overrides("bias")  # what the family defines counts for no method


WORDS: list[tuple[type[pf.Method], dict[str, Any], str]] = [
    (pf.LoRA, {"r": 8}, "PEFT's r is rank here: give rank=…"),
    (pf.LoRA, {"lora_alpha": 16}, "PEFT's lora_alpha is alpha here: give alpha=…"),
    (pf.LoRA, {"lora_dropout": 0.1}, "PEFT's lora_dropout is dropout here"),
    (pf.DoRA, {"use_rslora": True}, "PEFT's use_rslora is rslora here"),
    (pf.DyLoRA, {"r": 8}, "PEFT's r is rank here"),  # which PEFT does not have
    (pf.AdaLoRA, {"init_r": 8}, "PEFT's init_r is rank here"),
    (pf.LoRA, {"use_dora": True}, r"use_dora=True is a separate method here: give peftfn\.DoRA"),
    (pf.LoRA, {"init_lora_weights": "pissa"}, r"give peftfn\.PiSSA"),
    (pf.IA3, {"target_modules": ["q_proj"]}, r"peftfn\.adapt\(model, \{'q_proj\|v_proj': peftfn\.IA3\(\)\}"),
    (pf.LoRA, {"modules_to_save": ["lm_head"]}, r"peftfn\.Full\(\)"),
    (pf.LoRA, {"bias": "all"}, r"\{…, 'bias': peftfn\.Full\(\)\}"),
    (pf.LoRA, {"task_type": "SEQ_CLS"}, r"peftfn\.targets\(model, peftfn\.LoRA\(\), …, task='SEQ_CLS'\)"),
    (pf.LoRA, {"layers_to_transform": [1]}, r"layers=\[…\]"),
    (pf.LoRA, {"rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{…\}\) makes the rules of peftfn\.adapt"),
    (pf.LoRA, {"trainable_token_indices": [3]}, r"peftfn\.TrainableTokens\(\(…\)\)"),
    (pf.LoRA, {"eva_config": {}}, r"see peftfn\.starts\.eva"),
    (pf.PromptTuning, {"num_virtual_tokens": 5}, "give n=…"),
    (pf.LoRA, {"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
]


@pytest.mark.parametrize(("cls", "given", "says"), WORDS, ids=[f"{c.__name__}({next(iter(g))})" for c, g, _ in WORDS])
def test_pefts_words_are_refused_with_ours(cls: type[pf.Method], given: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        cls(**given)


def test_every_word_that_says_where_is_refused_with_what_says_it_here() -> None:
    """Words of all its configurations that are no hyper-parameters, but for those about the file itself."""
    hyper = {key for c in registry.values() if c.peft for key in (*c.peft.fields.values(), *c.peft.fixed)}
    about = {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"}
    shared = {f.name for f in dataclasses.fields(peft.LoraConfig)} & {
        f.name for f in dataclasses.fields(peft.OFTConfig)
    }
    assert {"bias", "layers_to_transform", "task_type"} <= shared
    for word in sorted(shared - hyper - about):
        with pytest.raises(TypeError, match=f"LoRA has no argument '{word}': "):
            pf.LoRA(**{word: None})


PEFTS = [(c, f, key) for c in registry.values() if c.peft for f, key in c.peft.fields.items() if "." not in key]


@pytest.mark.parametrize("cls", dict.fromkeys(c for c, *_ in PEFTS), ids=lambda c: c.__name__)
def test_every_word_of_peft_is_a_field_or_refused(cls: type[pf.Method]) -> None:
    own = cls.__dataclass_fields__
    for field, key in ((f, key) for c, f, key in PEFTS if c is cls):
        if key not in own:
            with pytest.raises(TypeError, match=f"PEFT's {key} is {field} here: give {field}=…"):
                cls(**{key: None})


@pytest.mark.parametrize("cls", [c for c in registry.values() if c.cases], ids=lambda c: c.__name__)
def test_a_method_is_copied_like_any_value(cls: type[pf.Method]) -> None:
    method = cls(**cls.cases[0])
    for again in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method), dataclasses.replace(method)):
        assert again == method
        assert hash(again) == hash(method)


# AdaLoRA's training: the allocator and the penalty.


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)).requires_grad_(False)


def peft_leaves(model: nn.Module, what: str = "data") -> dict[str, dict[str, Tensor]]:
    """AdaLoRA's tensors in PEFT's model, as our leaves; `what`: "data" or "grad"."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        if ".lora_" in name and "ranknum" not in name:
            site, _, kind = name.removeprefix("base_model.model.").removesuffix(".default").partition(".lora_")
            t = getattr(p, what).clone()
            out.setdefault(f"{site}.weight", {})[kind.lower()] = t.squeeze(-1) if kind == "E" else t
    return out


def test_adalora_gives_the_rank_where_peft_does() -> None:
    schedule = {"tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 9}
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, target_modules=["0", "1"], **schedule)
    theirs = peft.get_peft_model(two_layers(), config)
    method = pf.AdaLoRA(4, target_rank=2, warmup=1, final=2, interval=2, total_steps=9)
    adapter = peft_leaves(theirs)
    net = pf.adapt(two_layers(), {"weight": method})
    state, counts = Allocation.start(net, adapter), []
    g = torch.Generator().manual_seed(1)
    for step in range(8):
        for name, p in theirs.named_parameters():
            if ".lora_" in name and p.requires_grad:
                p.data += torch.randn(p.shape, generator=g) * 0.1
                p.grad = torch.randn(p.shape, generator=g)
        adapter = peft_leaves(theirs)
        state, adapter = allocate(state, adapter, peft_leaves(theirs, "grad"), step)
        theirs.base_model.update_and_allocate(step)
        want = peft_leaves(theirs)
        counts.append(sum(int((leaf["e"] != 0).sum()) for leaf in adapter.values()))
        for site, leaf in adapter.items():
            kept = leaf["e"] != 0
            if want[site]["e"].shape == leaf["e"].shape:
                assert torch.equal(leaf["e"], want[site]["e"]), f"step {step}, {site}"
            else:  # at the end PEFT cuts what is not kept off
                assert torch.equal(leaf["e"][kept], want[site]["e"]), f"step {step}, {site}"
    assert counts[0] == 8
    assert counts[-1] == 4


def test_adaloras_penalty_is_pefts() -> None:
    model = two_layers()
    config = peft.AdaLoraConfig(init_r=3, target_modules=["0", "1"], total_step=9, orth_reg_weight=1.0)
    theirs = peft.get_peft_model(model, config)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(2))

    # PEFT adds the penalty to an output's `loss`
    theirs.base_model.model.forward = lambda *_: type("Output", (), {"loss": torch.zeros(())})()
    penalty = theirs.base_model.forward(torch.ones(1, 8)).loss
    assert penalty > 1
    net = pf.adapt(two_layers(), {"weight": pf.AdaLoRA(3)})
    torch.testing.assert_close(orthogonality(net, peft_leaves(theirs)), penalty)


def test_hras_penalty() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), {"weight": pf.HRA(4)})
    a = net.init()
    assert hra.orthogonality(net, a) > 8 - 1e-4  # each column is there twice
    apart = {n: {"u": torch.linalg.qr(leaf["u"] + torch.randn_like(leaf["u"])).Q * 3} for n, leaf in a.items()}
    assert 0 <= hra.orthogonality(net, apart) < 1e-9
    g = torch.func.grad(lambda a: hra.orthogonality(net, a))(random(net))
    assert all(t.abs().max() > 1e-3 for t in pf.leaves(g))


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (pf.OFT(block_size=2, dropout=0.5), 4),
        (pf.OFT(block_size=2, dropout=0.3, exact=True), 2),
        (pf.OFT(block_size=2, dropout=0.9, share=True), 0),
        (pf.DiagOFT(block_size=2, dropout=0.5), 3),
    ],
    ids=str,
)
def test_dropped_blocks_do_not_turn(method: pf.Weight, count: int) -> None:
    """As many as in PEFT's MultiplicativeDropoutLayer, others each time, and none in eval mode."""
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    net = pf.adapt(model, {"weight": method})
    a, eye = random(net), torch.eye(16)
    still = pf.adapt(model, {"weight": replace(method, dropout=0.0)})

    def same() -> list[bool]:
        """Which pairs of columns (of rows, for Diag-OFT) the call leaves alone."""
        w, y = model[0].weight, net.apply(a, eye).mT
        w, y = (w.mT, y.mT) if isinstance(method, pf.DiagOFT) else (w, y)
        return [torch.allclose(w[:, i : i + 2], y[:, i : i + 2], atol=1e-6) for i in range(0, w.shape[1], 2)]

    drawn = [same() for _ in range(8)]
    assert [sum(d) for d in drawn] == [count] * 8
    assert len({tuple(d) for d in drawn}) > 1 or not count
    if isinstance(method, pf.OFT):
        layer = MultiplicativeDropoutLayer(method.dropout)
        blocks = torch.randn(1 if method.share else 8, 2, 2)
        assert sum(torch.equal(b, torch.eye(2)) for b in layer(blocks)) == count
    model.eval()
    assert torch.equal(net.apply(a, eye), still.apply(a, eye))
    assert torch.equal(net.merge(a)["0.weight"], still.merge(a)["0.weight"])


def test_ofts_dropout_is_in_pefts_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    config = peft.OFTConfig(oft_block_size=4, r=0, target_modules=["0"], module_dropout=0.25)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    net, a = pf.load(tmp_path / "theirs", nn.Sequential(nn.Linear(16, 12)))
    assert net.plan["0.weight"].method.dropout == 0.25
    pf.save(tmp_path / "ours", net, a, format="peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").module_dropout == 0.25


def test_kasas_penalty() -> None:
    net = pf.adapt(two_layers(), {"weight": pf.KaSA(2, truncate=True, beta=0.5, gamma=2.0)})
    adapter = shaken(net.init(), 1)
    want = torch.zeros(())
    for leaf in adapter.values():
        want += 0.5 * leaf["d"].norm() ** 2
        want += 2 * ((leaf["b"].T @ leaf["b"] - torch.eye(2)).norm() + (leaf["a"] @ leaf["a"].T - torch.eye(2)).norm())
    torch.testing.assert_close(kasa.penalty(net, adapter), want)
    other = pf.adapt(two_layers(), {"weight": pf.LoRA(2)})
    with pytest.raises(ValueError, match="the net has no KaSA at its 2 sites"):
        kasa.penalty(other, other.init())


def test_a_penalty_takes_each_sites_own_method() -> None:
    rules = {"0.weight": pf.KaSA(2, beta=1.0, gamma=0.0), "1.weight": pf.KaSA(2, beta=0.0, gamma=0.0)}
    net = pf.adapt(two_layers(), {**rules, "bias": pf.Full()})
    adapter = shaken(net.init(), 1)
    torch.testing.assert_close(kasa.penalty(net, adapter), adapter["0.weight"]["d"].square().sum())


def test_sites_with_two_schedules_share_no_budget() -> None:
    method = pf.AdaLoRA(4, target_rank=2, total_steps=9)
    net = pf.adapt(two_layers(), {"0.weight": method, "1.weight": pf.AdaLoRA(6, target_rank=2, total_steps=9)})
    Allocation.start(net, net.init())  # ranks may differ
    net = pf.adapt(two_layers(), {"0.weight": method, "1.weight": pf.AdaLoRA(4, target_rank=3, total_steps=9)})
    with pytest.raises(ValueError, match=r"1\.weight: AdaLoRA.*another schedule than .* at 0\.weight"):
        Allocation.start(net, net.init())


def test_montecloras_penalty_has_the_dirichlets_divergence() -> None:
    """What changes with `mix` alone, the draws being the same, is the divergence from the prior."""
    method = pf.MonteCLoRA(3, samples=4, prior=0.5, kl=2.0)
    net = pf.adapt(two_layers(), {"0.weight": method})
    adapter = net.init()

    def penalty(mix: Tensor) -> Tensor:
        torch.manual_seed(0)
        return monteclora.penalty(net, {"0.weight": adapter["0.weight"] | {"mix": mix}})

    def divergence(mix: Tensor) -> Tensor:
        return kl_divergence(Dirichlet(mix.exp()), Dirichlet(torch.full((4,), 0.5)))

    one, other = torch.tensor([0.3, -0.2, 1.0, 0.5]), torch.tensor([0.0, 0.4, -0.7, 0.1])
    torch.testing.assert_close(penalty(one) - penalty(other), 2 * (divergence(one) - divergence(other)))


# T-LoRA's masks.


def test_tloras_mask_is_a_smaller_active() -> None:
    assert rank_mask(0, 10, 4).tolist() == [True] * 4
    assert rank_mask(10, 10, 4).tolist() == [True, False, False, False]
    assert rank_mask(torch.tensor([0, 5, 10]), 10, 4, minimum=2).sum(-1).tolist() == [4, 3, 2]
    model, x = two_layers(), torch.randn(3, 8)
    net, few = (pf.adapt(model, {"0.weight": pf.TLoRA(4, active=n)}) for n in (None, 2))
    adapter = shaken(net.init(), 3)
    off = masked(net, adapter, torch.tensor([True, True, False, False]))
    torch.testing.assert_close(net.apply(off, x), few.apply(adapter, x))
    assert not torch.allclose(net.apply(off, x), net.apply(adapter, x))


# Methods that start from the weight.


@pytest.mark.parametrize("method", [pf.PiSSA(2), pf.OLoRA(2), pf.TLoRA(2)], ids=str)
def test_a_start_from_the_weight_is_computed_once(method: pf.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    net = pf.adapt(two_layers(), {"0.weight": method})
    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, None)
    leaf, frozen = net.init()["0.weight"], net.plan["0.weight"].frozen
    for k, t in leaf.items():
        assert torch.equal(t, frozen[f"{k}0"])
        t += 1  # it is a copy
        assert not torch.equal(t, frozen[f"{k}0"])


# Trained tokens in a model whose head is its embedding.


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = {
    "beside LoRA": peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 7]),
    "alone": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 7]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")  # of PEFT's own calls, and advice
@pytest.mark.parametrize("config", TOKENS.values(), ids=TOKENS)
def test_tied_tokens_are_pefts(config: peft.PeftConfig, tmp_path: Path) -> None:
    """PEFT replaces the rows of the head too, though its file has those of the embedding alone."""
    theirs = peft.get_peft_model(tied_llama(), config).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=g) * 0.3
    theirs.save_pretrained(tmp_path / "theirs")
    net, adapter = pf.load(tmp_path / "theirs", tied_llama())
    rules = [rule for rule, method in net.plan.rules.items() if isinstance(method, pf.TiedTokens)]
    assert len(rules) == 1
    assert adapter["TiedTokens"]["t"].shape == (2, 16)
    ids = torch.tensor([[3, 1, 7], [2, 3, 3]])
    adapter["TiedTokens"]["t"].requires_grad_()
    ours, want = net.apply(adapter, ids).logits, theirs(ids).logits
    torch.testing.assert_close(ours, want)
    ours.square().sum().backward()
    want.square().sum().backward()
    (trained,) = [p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n]
    torch.testing.assert_close(adapter["TiedTokens"]["t"].grad, trained.grad, rtol=1e-4, atol=1e-4)
    pf.save(tmp_path / "ours", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, want)


def test_tied_tokens_must_be_tied() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**tied_llama().config.to_dict(), "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has other rows at \(3,\) than model\.embed_tokens\.weight"):
        pf.adapt(model, {"embed_tokens|lm_head": pf.TiedTokens((3,))}).init()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*tokens has 99"):
        pf.adapt(tied_llama(), {"embed_tokens|lm_head": pf.TiedTokens((99,))})


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # and PEFT applies them
def test_osf_keeps_what_peft_keeps_at_each_layer(tmp_path: Path) -> None:
    """OSF's rank_pattern is searched in the name, unlike that of other methods."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"in_q": nn.Linear(8, 8), "in_v": nn.Linear(8, 8), "out": nn.Linear(8, 8)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(base)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers.values():
                x = torch.tanh(layer(x))
            return x

    config = peft.OSFConfig(
        target_modules=["in_q", "in_v", "out"], effective_rank=4, rank_pattern={"_v": 6, "^lay.*t$": 0.5}
    )
    theirs = peft.get_peft_model(Model().eval(), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    theirs.save_pretrained(tmp_path)
    net, adapter = pf.load(tmp_path, Model().eval())
    assert {n: leaf["s"].numel() for n, leaf in adapter.items()} == {
        "layers.in_q.weight": 4,
        "layers.in_v.weight": 2,
        "layers.out.weight": 4,
    }
    x = torch.randn(3, 8)
    torch.testing.assert_close(net.apply(adapter, x), theirs(x))


# FRoD, whose checkpoints depend on a decomposition of the base.


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_frod_is_pefts() -> None:
    config = peft.FrodConfig(target_modules=["0"], sparse_rate=0.2, projection_prng_key=3)
    theirs = peft.get_peft_model(two_layers(), config).eval()
    net = pf.adapt(two_layers(), {"0.weight": pf.FRoD(density=0.2, projection_seed=3)})
    layer = theirs.base_model.model[0]
    g = torch.Generator().manual_seed(4)
    start = layer.frod_lambda_l["default"].data.clone()
    with torch.no_grad():
        for p in (layer.frod_lambda_l["default"], layer.frod_lambda_s_values["default"]):
            p += torch.randn(p.shape, generator=g) * 0.3
    adapter = {
        "0.weight": {
            "d": (layer.frod_lambda_l["default"] - start).detach(),
            "s": layer.frod_lambda_s_values["default"].detach(),
        }
    }
    frozen = net.plan["0.weight"].frozen
    torch.testing.assert_close(frozen["U"], layer.frod_U["default"], rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen["places"], layer.frod_s_indices["default"])
    x = torch.randn(4, 8, generator=g)
    torch.testing.assert_close(net.apply(adapter, x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs(x), net.model(x), atol=1e-2)


# The wavelets.


WAVELETS = [f"db{n}" for n in range(1, 39)] + [f"sym{n}" for n in range(2, 11)] + [f"coif{n}" for n in range(1, 5)]


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_are_orthonormal(name: str) -> None:
    h = torch.tensor(low_pass(name), dtype=torch.float64)
    shifts = torch.stack([torch.roll(torch.cat([h, torch.zeros(len(h))]), 2 * k) for k in range(len(h) // 2)])
    torch.testing.assert_close(shifts @ shifts.T, torch.eye(len(shifts), dtype=h.dtype), rtol=0, atol=1e-7)
    assert h.sum().item() == pytest.approx(2**0.5, abs=1e-9)


# Settings at the edge of what a method can be.


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (pf.SHiRA(32), r"0\.weight: SHiRA\.rank is 32.*choose rank <= 3"),
        (pf.FourierFT(n_frequency=99), r"0\.weight: FourierFT\.n_frequency is 99"),
        (pf.WaveFT(n_frequency=99), r"0\.weight: WaveFT\.n_frequency is 99"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, pf.Method) else "",
)
def test_what_does_not_fit_a_rules_sites_names_the_first(method: pf.Method, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pf.adapt(two_layers(), {"weight": method})


def test_randlora_refuses_projections_without_a_spread() -> None:
    """PEFT divides by their standard deviation, which is then zero or none."""
    for method in (pf.RandLoRA(1), pf.RandLoRA(1, density="sparse")):
        with pytest.raises(ValueError, match=r"0\.weight: RandLoRA\.rank is 1.* numbers drawn for A are all alike"):
            pf.adapt(nn.Sequential(nn.Linear(1, 3)), {"weight": method})


@pytest.mark.parametrize("cls", [pf.AdaLoRA, pf.BDLoRA, pf.KaSA, pf.PiSSA, pf.VBLoRA, pf.DeLoRA])
def test_a_dropout_is_a_probability(cls: type[pf.Method]) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.dropout is 2\.0"):
        cls(dropout=2.0)  # type: ignore[call-arg]


def test_glora_has_no_part_that_trains_nothing() -> None:
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False))
    adapter = pf.adapt(layers, {"weight": pf.GLoRA(2)}).init()
    assert adapter["0.weight"].keys() - adapter["1.weight"].keys() == {"d"}  # D scales a bias
    with pytest.raises(ValueError, match="nothing is trained"):
        pf.GLoRA(a_b="none", c="none", d_e="none")


def test_a_method_of_the_bias_leaves_the_weight_in_its_slot() -> None:
    seen: list[Tensor] = []

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight)
            return super().forward(x)

    net = pf.adapt(Layer(4, 3).requires_grad_(False), {"weight": pf.BEFT()})
    adapter = shaken(net.init(), 1)
    y = net.apply(adapter, torch.eye(4))
    assert isinstance(seen[0], Tensor)
    assert seen[0].data_ptr() == net.model.weight.data_ptr()
    torch.testing.assert_close(y, net.model(torch.eye(4)) + adapter["weight"]["beta"])


@pytest.mark.parametrize("method", [pf.VeLoRA(2, groups=2), pf.LoRA(2), pf.MiSS(2), pf.OFT(block_size=2)], ids=str)
def test_one_feature_vector_trains(method: pf.Method) -> None:
    net = pf.adapt(two_layers().train(), {"0.weight": method})
    adapter = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in shaken(net.init(), 1).items()}
    net.apply(adapter, torch.ones(8)).square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in adapter["0.weight"].values())


@pytest.mark.parametrize("method", [pf.LoHa(1, rank_dropout=0.5), pf.LoKr(1, module_dropout=0.5)], ids=str)
def test_a_change_that_is_dropped_in_training_can_be_prepared(method: pf.Method) -> None:
    net, x = pf.adapt(two_layers().train(), {"0.weight": method}), torch.ones(2, 8)
    one, other = (shaken(net.init(), i) for i in range(2))
    both = net.mixed(pf.stack([one, other]), [1, 0], x)  # each with a mask of its own
    assert both.isfinite().all()
    ready = net.prepare(one)
    net.model.eval()
    torch.testing.assert_close(net.apply(ready, x), net.apply(one, x))


@pytest.mark.parametrize("attached", [False, True])
def test_a_pruned_row_stays_one_under_dora(attached: bool) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    model.weight.data[1] = 0
    net = pf.adapt(model, {"weight": pf.DoRA(2, attached=attached)})
    a = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in net.init().items()}
    y = net.apply(a, x)
    torch.testing.assert_close(y, model(x))
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in a["weight"].values())
    torch.testing.assert_close(net.merge(net.init())["weight"], model.weight.detach())
