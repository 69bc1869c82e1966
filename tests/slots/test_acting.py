"""Methods that act on some tokens alone: activated LoRA, by the token ids of a call, on every route, as PEFT has it."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import by_name
from peft import LoraConfig, get_peft_model
from support import close, random
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf
from peftfn.testing.case import Case
from peftfn.testing.laws import routes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*aLoRA:UserWarning")

INVOCATION = [5, 9]
IDS = torch.tensor([[5, 9, 3, 4, 6, 7], [3, 4, 6, 8, 5, 9], [5, 9, 3, 5, 9, 4], [3, 4, 6, 7, 8, 5]])
"""In which the invocation comes early, late, twice and never."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
RULE = "q_proj|v_proj"


def config(invocation: Any = INVOCATION, r: int = 4) -> LoraConfig:
    found = {"alora_invocation_tokens": invocation} if invocation else {}
    return LoraConfig(r=r, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **found)


def method(invocation: Any = INVOCATION, r: int = 4) -> pf.Method:
    return pf.ALoRA(r, alpha=6, invocation=invocation) if invocation else pf.LoRA(r, alpha=6)


def theirs(base: Any, **adapters: tuple[LoraConfig, pf.Adapter]) -> Any:
    """PEFT's model with these adapters, the first one active."""
    model: Any = None
    for name, (how, a) in adapters.items():
        if model is None:
            model = get_peft_model(copy.deepcopy(base), how, adapter_name=name)
        else:
            model.add_adapter(name, how)
        for key, p in model.named_parameters():
            if f".{name}." in key:
                site, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
                p.data.copy_(a[f"{site}.weight"][rest[0].lower()])
    return model.eval()


def setting(*invocations: Any) -> tuple[Any, list[pf.Adapted], list[pf.Adapter]]:
    base = by_name["llama"].build()
    nets = [pf.adapt(base, {RULE: method(t)}) for t in invocations]
    return base, nets, [random(net, i, scale=0.4) for i, net in enumerate(nets)]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """IDS beside two tokens of padding, and their mask; the last row is all tokens."""
    ids, mask = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)
    at = slice(2, 8) if side == "left" else slice(0, 6)
    ids[:, at], mask[:, at] = IDS, 1
    ids[3], mask[3] = torch.tensor([1, 2, 3, 5, 9, 7, 8, 6]), 1
    return ids, mask


# What PEFT does.


@pytest.mark.parametrize("side", ["left", "right"])
def test_calls_and_modules_are_pefts(side: str) -> None:
    """Logits, gradients and generated tokens, for rows of several lengths."""
    base, (net,), (a,) = setting(INVOCATION)
    model, m, (ids, mask) = theirs(base, default=(config(), a)), pf.as_module(net, a), padded(side)
    want = model(input_ids=ids, attention_mask=mask).logits
    close(net.apply(a, ids, attention_mask=mask).logits, want)
    close(m(ids, mask).logits, want)
    assert (want - base(input_ids=ids, attention_mask=mask).logits)[3].abs().max() > 1e-2

    def loss(logits: Tensor) -> Tensor:
        return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()

    loss(want).backward()
    loss(m(input_ids=ids, attention_mask=mask).logits).backward()
    slopes = grad(lambda a: loss(net.apply(a, ids, attention_mask=mask).logits))(a)
    named = dict(m.named_parameters())
    seen = 0
    for key, p in model.named_parameters():
        if "lora_" in key:
            site, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            close(slopes[f"{site}.weight"][rest[0].lower()], p.grad, 1e-4)
            own = next(q for n, q in named.items() if n.startswith(site) and n.endswith(f".default.{rest[0].lower()}"))
            close(own.grad, p.grad, 1e-4)
            seen += 1
    assert seen == 8
    if side == "left":
        want = model.generate(input_ids=ids, attention_mask=mask, **OPTIONS)
        for cache in (True, False):
            options = {"attention_mask": mask, "use_cache": cache, **OPTIONS}
            assert torch.equal(net.apply(a, ids, method="generate", **options), want)
            assert torch.equal(m.generate(ids, **options), want)
        assert not torch.equal(base.generate(ids, attention_mask=mask, **OPTIONS), want)
        beams = net.apply(a, ids, method="generate", attention_mask=mask, num_beams=2, **OPTIONS)
        assert torch.equal(m.generate(input_ids=ids, attention_mask=mask, num_beams=2, **OPTIONS), beams)


def test_trainer_trains_a_module_as_it_does_pefts(tmp_path: Path) -> None:
    base, (net,), (a,) = setting(INVOCATION)
    tf.logging.set_verbosity_error()
    model, m = theirs(base, default=(config(), a)), pf.as_module(net, a)
    how: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0, "use_cpu": True}
    how |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    for trained in (model, m):
        args = tf.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **how)
        tf.Trainer(trained, args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS] * 4).train()
    got, moved = pf.adapter_of(m), 0.0
    for key, p in model.named_parameters():
        if "lora_" in key:
            site, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            mine = got[f"{site}.weight"][rest[0].lower()]
            close(mine, p)
            moved = max(moved, float((mine - a[f"{site}.weight"][rest[0].lower()]).abs().max()))
    assert moved > 1e-2


def test_a_module_with_several_adapters_is_pefts() -> None:
    """Each by itself, another activated one with other tokens, and the sum of an activated one and a plain one."""
    base, nets, adapters = setting(INVOCATION, [8], None)
    names = ("one", "two", "plain")
    held = {n: (net, a) for n, net, a in zip(names, nets, adapters, strict=True)}
    m = pf.as_module(nets[0], **held)
    model = theirs(base, **{n: (config(t), held[n][1]) for n, t in zip(names, (INVOCATION, [8], None), strict=True)})
    for name in names:
        model.set_adapter(name)
        with m.use(name):
            close(m(IDS).logits, model(input_ids=IDS).logits)
            assert torch.equal(m.generate(IDS, **OPTIONS), model.generate(input_ids=IDS, **OPTIONS))
    model.set_adapter("one")
    model.base_model.set_adapter(["one", "plain"])  # the tokens are those of the first
    with m.use(["one", "plain"]):
        close(m(IDS).logits, model(input_ids=IDS).logits)
    together = pf.Nets(nets).gated([pf.stack([a]) for a in adapters], [1.0, 1.0, 1.0], IDS).logits
    with m.use(list(names)):
        close(m(IDS).logits, together)
    with m.use(None):
        close(m(IDS).logits, base(IDS).logits)


def test_mixed_batches_are_pefts() -> None:
    """Rows of two activated adapters, a plain one and the base: in nets, and in a bank."""
    base, nets, adapters = setting(INVOCATION, [8], None)
    names = ["one", "two", "plain", "__base__", "one"]
    ids = torch.cat([IDS, IDS[1:2]])
    model = theirs(
        base,
        one=(config(), adapters[0]),
        two=(config([8]), adapters[1]),
        plain=(config(None), adapters[2]),
    )
    want = model(input_ids=ids, adapter_names=names).logits
    stacks = [pf.stack([a]) for a in adapters]
    close(pf.Nets(nets).mixed(stacks, [0, 1, 2, -1, 0], ids).logits, want)
    bank = pf.bank({n: (net, a) for n, net, a in zip(names, nets, adapters, strict=False)})
    close(bank.apply(names, ids).logits, want)
    tokens = model.generate(input_ids=ids, adapter_names=names, **OPTIONS)
    assert torch.equal(bank.apply(names, ids, method="generate", **OPTIONS), tokens)


# Beside a cache.


def filled(base: Any, ids: Tensor) -> Any:
    cache = tf.DynamicCache(config=base.config)
    with torch.no_grad():
        base(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_cache_of_the_base_equals_no_cache(cut: int) -> None:
    """What the base has computed before the invocation serves every activated adapter, on every route, as in PEFT."""
    base, (net, other), (a, b) = setting(INVOCATION, [9])
    ids = torch.cat([torch.tensor([[1, 2, 3, 4, 6]]).expand(4, -1), IDS], 1)
    start = base.generate(ids[:, :cut], **OPTIONS)  # the base first; its cache then, for both
    assert start.shape[1] == cut + 4
    model = theirs(base, default=(config(), a))
    want = net.apply(a, ids, method="generate", **OPTIONS)
    gates = pf.alora_gates(ids, [INVOCATION])
    sites = {"q_proj": gates, "v_proj": gates}
    m, s = pf.as_module(net, a), pf.stack([a])
    ways: list[Callable[[Any], Tensor]] = [
        lambda cache: net.apply(a, ids, method="generate", past_key_values=cache, **OPTIONS),
        lambda cache: m.generate(ids, past_key_values=cache, **OPTIONS),
        lambda cache: net.gated(s, gates, ids, method="generate", past_key_values=cache, **OPTIONS),
        lambda cache: net.gated(s, sites, ids, method="generate", past_key_values=cache, **OPTIONS),
        lambda cache: net.mixed(s, [0] * 4, ids, method="generate", past_key_values=cache, **OPTIONS),
        lambda cache: model.generate(input_ids=ids, past_key_values=cache, **OPTIONS),
    ]
    for way in ways:
        assert torch.equal(way(filled(base, ids[:, :cut])), want)
    both = other.apply(b, ids, method="generate", past_key_values=filled(base, ids[:, :cut]), **OPTIONS)
    assert torch.equal(both, other.apply(b, ids, method="generate", **OPTIONS))
    step = net.apply(a, ids[:3, cut:], past_key_values=filled(base, ids[:3, :cut])).logits  # one call over the cache
    close(step, net.apply(a, ids[:3]).logits[:, cut:])
    index = torch.where(gates[..., 0] > 0, 0, -1)
    got = net.mixed(s, index, ids, method="generate", past_key_values=filled(base, ids[:, :cut]), **OPTIONS)
    assert torch.equal(got, want)


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "prefill_chunk_size"])
def test_steps_of_several_tokens_have_their_own_gates(how: str) -> None:
    """Steps that a `generate` makes of several tokens, some of which it takes back: their positions say which gates."""
    _, (net,), (a,) = setting(INVOCATION)
    ids, s = IDS[2:3], pf.stack([a])
    gates = torch.rand(1, 6, 1, generator=torch.Generator().manual_seed(0))
    more = {**OPTIONS, how: 2}
    want = net.gated(s, gates, ids, method="generate", **OPTIONS)
    assert torch.equal(net.gated(s, gates, ids, method="generate", **more), want)
    index = torch.tensor([[-1, 0, 0, -1, -1, 0]])
    want = net.mixed(s, index, ids, method="generate", **OPTIONS)
    assert torch.equal(net.mixed(s, index, ids, method="generate", **more), want)
    assert torch.equal(pf.as_module(net, a).generate(ids, **more), net.apply(a, ids, method="generate", **OPTIONS))


# One meaning.


def test_a_bias_of_the_adapter_acts_where_it_does() -> None:
    routes(Case(pf.ALoRA(2, lora_bias=True, init_weights="random", invocation=(3,))))


def test_transforms_and_the_compiler_take_the_gates_from_the_ids() -> None:
    _, (net,), (a,) = setting(INVOCATION)
    f = lambda a, ids: net.apply(a, ids).logits  # noqa: E731
    want = f(a, IDS)
    close(vmap(f, (None, 0))(a, IDS[:, None])[:, 0], want)
    m, seen = pf.as_module(net, a), []
    torch._dynamo.reset()

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    compiled = torch.compile(m, fullgraph=True, backend=backend)  # the law `compiled` has apply
    for ids in (IDS, IDS.flip(0)):
        close(compiled(ids).logits, f(a, ids))
    assert len(seen) == 1


def test_a_module_is_copied_pickled_and_checkpointed_with_its_gates() -> None:
    _, (net,), (a,) = setting(INVOCATION)
    m = pf.as_module(net, a)
    want = m(IDS).logits
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        close(other(IDS).logits, want, 0)
    want.sum().backward()
    slopes = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    m.train().gradient_checkpointing_enable()
    m(IDS, use_cache=False).logits.sum().backward()
    assert slopes and all(torch.allclose(p.grad, slopes[n], atol=1e-5) for n, p in m.named_parameters() if n in slopes)


def test_an_activated_adapter_comes_into_a_module_that_has_none() -> None:
    _, (plain, net), (b, a) = setting(None, INVOCATION)
    m = pf.as_module(plain, one=b)
    pf.attach_(m, "two", (net, a))
    close(m(IDS).logits, plain.apply(b, IDS).logits, 0)
    m.use_("two")
    close(m(IDS).logits, net.apply(a, IDS).logits)


def test_gates_of_the_caller_weigh_what_acts() -> None:
    """By adapter and by row they weigh it; what is said for each token is taken as it is, ones too."""
    base, (net, plain), (a, _) = setting(INVOCATION, None)
    s, own, everywhere = pf.stack([a]), net.apply(a, IDS).logits, plain.apply(a, IDS).logits
    close(net.gated(s, [1.0], IDS).logits, own)
    close(net.gated(s, torch.ones(4, 1), IDS).logits, own)
    close(net.gated(s, {"q_proj": [1.0], "v_proj": torch.ones(4, 1)}, IDS).logits, own)
    close(net.gated(s, torch.ones(4, 6, 1), IDS).logits, everywhere)
    close(net.mixed(s, torch.zeros(4, 6, dtype=torch.long), IDS).logits, everywhere)
    close(net.gated(s, pf.PerForward(lambda ids: torch.ones(4, 1)), IDS).logits, own)
    embedded = base.get_input_embeddings()(IDS)
    gates = pf.alora_gates(IDS, [INVOCATION])
    close(net.gated(s, gates, inputs_embeds=embedded).logits, own)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gates_of_tokens_for_no_rows(tokens: int) -> None:
    net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(2)})
    s = pf.stack([net.init(0), net.init(1)])
    assert net.gated(s, torch.rand(0, tokens, 2), torch.rand(0, tokens, 8)).shape == (0, tokens, 4)


# What is refused.


def test_what_does_not_say_where_it_acts_is_an_error_at_once() -> None:
    base, (net,), (a,) = setting(INVOCATION)
    s, m, site = pf.stack([a]), pf.as_module(net, a), r"layers\.0\.self_attn\.q_proj\.weight: ALoRA"
    embedded = base.get_input_embeddings()(IDS)
    for call in (
        lambda: net.apply(a, inputs_embeds=embedded),
        lambda: net.mixed(s, [0] * 4, inputs_embeds=embedded),
        lambda: net.gated(s, [0.5], inputs_embeds=embedded),
        lambda: m(inputs_embeds=embedded),
        lambda: m.generate(inputs_embeds=embedded, **OPTIONS),
    ):
        with pytest.raises(ValueError, match=site + r".*no input_ids.*net\.gated"):
            call()
    cache = filled(base, IDS)
    for call in (
        lambda: net.apply(a, IDS[:, :1], past_key_values=cache),
        lambda: m(IDS[:, :1], past_key_values=cache),
    ):
        with pytest.raises(ValueError, match=site + r".*none of the 1 tokens of row 0.*holds 6 tokens before"):
            call()
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match=site + r".*a part of it was called by itself"):
        m.model(IDS)
    with pytest.raises(ValueError, match="the gates here are a function"):
        net.gated(s, lambda site, x: torch.ones(1), IDS)
    with pytest.raises(ValueError, match=site + ".*depends on the input"):
        dict(pf.merged(m))
    t5 = by_name["t5"]
    model = t5.build()
    two = pf.adapt(model, {"q": pf.ALoRA(2)})
    with pytest.raises(ValueError, match=r"ALoRA.*an encoder and a decoder"):
        two.apply(two.init(), input_ids=IDS, decoder_input_ids=IDS)


def test_a_method_that_says_it_wrongly() -> None:
    class Halves(pf.LoRA):
        mergeable = False

        def acts_on(self, ids: Tensor) -> Tensor:
            return ids[:, :1] > 0

    net = pf.adapt(by_name["llama"].build(), {"q_proj": Halves(2)})
    with pytest.raises(ValueError, match=r"q_proj\.weight: Halves\.acts_on returns a torch\.bool tensor \[4, 1\] for"):
        net.apply(net.init(), IDS)

    class Merged(pf.LoRA):
        def acts_on(self, ids: Tensor) -> Tensor:
            return torch.ones(ids.shape)

    with pytest.raises(ValueError, match=r"q_proj\.weight.*Merged acts on some tokens alone.*mergeable = False"):
        pf.adapt(net.model, {"q_proj": Merged(2)})
    for order in ((pf.LoRA(2), Halves(2)), (Halves(2), pf.LoRA(2))):
        with pytest.raises(ValueError, match=r"chain: Halves.*acts on some tokens alone"):
            pf.chain(*order)


# The gates by themselves.


def test_the_last_occurrence_counts_from_its_first_token() -> None:
    ids = torch.tensor([[5, 9, 1, 5, 9, 2], [1, 2, 5, 9, 5, 3], [9, 5, 1, 1, 1, 5], [5, 9, 5, 9, 5, 9]])
    want = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert pf.alora_gates(ids, [INVOCATION])[..., 0].tolist() == want
    two = pf.alora_gates(ids, [INVOCATION, None], [0, 1, -1, 0])
    assert two[..., 0].tolist() == [want[0], [0] * 6, [0] * 6, want[3]]
    assert two[..., 1].tolist() == [[0] * 6, [1] * 6, [0] * 6, [0] * 6]
    assert pf.alora_gates(ids, [[1] * 7]).sum() == 0
    for bad, match in (
        (lambda: pf.alora_gates(ids[0], [[1]]), "input_ids"),
        (lambda: pf.alora_gates(ids, [[]]), "empty"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    with pytest.raises(ValueError, match="index"):
        pf.alora_gates(ids, [[1]], [0])
