"""The engine: what a request gets is what `generate` gives alone, whoever stands beside it, comes and goes."""

import re
import shutil
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers as tf
from served import Answer, Held, alone, engine, folders, model, prompts
from support import OURS, random

import peftfn as pf
from peftfn.serving.batch import Batch, Stepper
from peftfn.serving.sampling import Defaults, Sampling, choose, generator
from peftfn.serving.ticket import Ask, Full, Stopped


@pytest.fixture
def running() -> Any:
    """Makes engines that are closed after the test."""
    made = []

    def make(*args: Any, **more: Any) -> Any:
        made.append(engine(*args, **more))
        return made[-1]

    yield make
    for e in made:
        e.close()
        assert e.adapters._users == {} or not any(e.adapters._users.values()), "a request holds its adapter still"


def test_requests_of_many_adapters_are_each_what_generate_gives(tmp_path: Path, running: Any) -> None:
    base = model()
    made = folders(tmp_path / "a", base, 12)
    names = [f"user{i % 12}" if i % 5 else None for i in range(40)]
    asked, lengths = prompts(40), [1 + (7 * i) % 12 for i in range(40)]
    e = running(base, tmp_path / "a", slots=4)
    answers = [Answer(e, Ask(p, n, m)) for p, n, m in zip(asked, names, lengths, strict=True)]
    got = [a.tokens() for a in answers]
    net = made["user0"][0]
    want = [alone(*(made[n] if n else (net, None)), p, m) for p, n, m in zip(asked, names, lengths, strict=True)]
    assert got == want
    plain = [alone(net, None, p, m) for p, m in zip(asked, lengths, strict=True)]
    assert sum(a != b for a, b in zip(want, plain, strict=True)) > 20, "the adapters do nothing: this is no check"
    assert e.adapters.resident == 4 and e.adapters.registered == 12, "the bank had to change its residents"


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Bloom", "Mistral", "Gemma2", "Mixtral"])
def test_other_architectures_answer_as_generate_does(kind: str, tmp_path: Path, running: Any) -> None:
    """Positions given, positions counted by the mask, distances alone, windows shorter than the answer, experts."""
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": None}
    more = {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "sliding_window": 4, "pad_token_id": 0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    more = {"ffn_dim": 24, "word_embed_proj_dim": 16} if kind == "OPT" else {} if kind in ("GPT2", "Bloom") else more
    torch.manual_seed(0)
    base = getattr(tf, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(tf, f"{kind}Config")(**size, **more, **experts)
    ).eval()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.25) if p.dim() > 1 else None
    net = pf.adapt(base, {"attn|attention": pf.LoRA(2)})
    pf.save(tmp_path / "a" / "one", net, a := random(net, 1, scale=0.3))
    asked = [[4 + t % 60 for t in p] for p in prompts(6)]
    e = running(base, tmp_path / "a", text=False)
    answers = [Answer(e, Ask(p, "one" if i % 2 else None, 8)) for i, p in enumerate(asked)]
    assert [x.tokens() for x in answers] == [alone(net, a if i % 2 else None, p, 8) for i, p in enumerate(asked)]


def test_models_that_rows_cannot_join_are_refused() -> None:
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(TypeError, match="none of transformers' causal language models"):
        Stepper(tf.MambaForCausalLM(tf.MambaConfig(**size)).eval())
    with pytest.raises(TypeError, match="none of transformers' causal language models"):
        Stepper(torch.nn.Linear(2, 2))
    t5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(TypeError, match="has an encoder"):
        Stepper(tf.T5ForConditionalGeneration(tf.T5Config(**t5)).eval())
    odd = model()
    odd.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3, which serve does not do"):
        engine(odd, None)
    with pytest.raises(ValueError, match="4 rows may use as many adapters, and there are 2 slots"):
        engine(model(), None, slots=2)


def test_the_models_own_penalty_is_applied(running: Any) -> None:
    base = model()
    base.generation_config.repetition_penalty = 1.5
    e, net = running(base, None), pf.adapt(base, {"q_proj": pf.LoRA(1)})
    asked = prompts(4)
    got = [Answer(e, Ask(p, None, 8)).tokens() for p in asked]
    assert got == [alone(net, None, p, 8) for p in asked]
    base.generation_config.repetition_penalty = None
    assert got != [alone(net, None, p, 8) for p in asked]


def test_a_request_ends_with_the_adapter_it_began_with(tmp_path: Path, running: Any) -> None:
    base = model(end=None)
    made = folders(tmp_path / "a", base, 3)
    e = running(base, tmp_path / "a", slots=4)
    held = Held(e, Ask([5, 6], "user1", 10))
    before = [*held.next().tokens]
    e.adapters.remove("user1")
    assert e.adapters.names == ["user0", "user2"]
    with pytest.raises(KeyError, match="no adapter 'user1': it was removed"):
        e.submit(Ask([5], "user1"), print)
    with pytest.raises(KeyError, match="removed already"):
        e.adapters.remove("user1")
    e.adapters.put("user1", "user2")
    other = Answer(e, Ask([5, 6], "user1", 10))
    wide = Answer(e, Ask([5, 6], "user0", 10))  # of a wider plan, which takes the place of the narrow one
    held.go()
    assert before + held.tokens() == alone(*made["user1"], [5, 6], 10)
    assert other.tokens() == alone(*made["user2"], [5, 6], 10)
    assert wide.tokens() == alone(*made["user0"], [5, 6], 10)
    assert len(e.adapters.bank.nets.nets) == 1
    assert len(e.adapters.bank) == 2, "the bank holds an adapter that nobody can ask for"


def test_a_full_queue_says_when_to_come_again_and_a_cancelled_request_makes_room(running: Any) -> None:
    base = model(end=None)
    e, net = running(base, None, rows=1, queue=2), pf.adapt(base, {"q_proj": pf.LoRA(1)})
    held = Held(e, Ask([5, 6], None, 100))
    held.next()
    waiting = [Answer(e, Ask([7, i], None, 3)) for i in (2, 3)]
    with pytest.raises(Full, match="2 requests wait already, as many as the queue holds: try again in") as full:
        e.submit(Ask([5]), print)
    assert 1 <= full.value.seconds <= 60
    held.ticket.cancel()
    waiting[0].ticket.cancel()
    held.go()
    assert waiting[1].tokens() == alone(net, None, [7, 3], 3)
    assert waiting[0].empty() and len(held.ticket.out) < 5
    assert e.waiting == 0


def test_a_pass_that_fails_is_taken_again_row_by_row(tmp_path: Path, running: Any, caplog: Any) -> None:
    base = model(end=None)
    made = folders(tmp_path / "a", base, 3)
    e = running(base, tmp_path / "a")
    step, fails = e.stepper.step_, iter([False, True, False, False, True])

    def sometimes(*args: Any) -> Any:
        out = step(*args)
        if next(fails, False):
            raise RuntimeError("out of memory")
        return out

    e.stepper.step_ = sometimes
    held = Held(e, Ask([9], None, 2))  # so that the others are one group
    held.next()
    answers = [Answer(e, Ask([5, 6, 7 + i], f"user{i}", 9)) for i in range(3)]
    held.go()
    assert [a.tokens() for a in answers] == [alone(*made[f"user{i}"], [5, 6, 7 + i], 9) for i in range(3)]

    def never(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    e.stepper.step_ = never
    assert "the model failed on this request: RuntimeError: out of memory" in Answer(e, Ask([5])).all()[-1].error
    e.stepper.step_ = step
    assert Answer(e, Ask([5], "user0", 4)).tokens() == alone(*made["user0"], [5], 4)


def test_an_adapter_whose_file_is_gone_fails_alone(tmp_path: Path, running: Any) -> None:
    base = model(end=None)
    made = folders(tmp_path / "a", base, 3)
    e = running(base, tmp_path / "a")
    Answer(e, Ask([5], "user0", 1)).tokens()
    e.adapters.bank.evict()
    shutil.rmtree(tmp_path / "a" / "user0")
    held = Held(e, Ask([9], None, 2))
    held.next()
    gone, well = Answer(e, Ask([5, 6], "user0", 5)), Answer(e, Ask([5, 6], "user1", 5))
    held.go()
    why = gone.all()[-1].error
    assert "adapter 'user0' cannot be read" in why and str(tmp_path) not in why
    assert well.tokens() == alone(*made["user1"], [5, 6], 5)


def test_a_seed_says_what_is_drawn_whoever_stands_beside(running: Any) -> None:
    base = model(end=None)
    e = running(base, None)
    how = Sampling(temperature=1.5, seed=7)
    first = Answer(e, Ask([5, 6], None, 12, how)).tokens()
    crowd = [Answer(e, Ask(p, None, 12, Sampling(2.0))) for p in prompts(3)]
    assert Answer(e, Ask([5, 6], None, 12, how)).tokens() == first
    assert Answer(e, Ask([5, 6], None, 12, Sampling(1.5, seed=8))).tokens() != first
    greedy = Answer(e, Ask([5, 6], None, 12)).tokens()
    assert Answer(e, Ask([5, 6], None, 12, Sampling(1.5, top_p=1e-9, seed=8))).tokens() == greedy
    assert all(len(a.tokens()) == 12 for a in crowd)


def test_what_is_drawn_has_the_probabilities_of_the_logits() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    how, defaults = Sampling(temperature=2.0, top_p=0.9, seed=0), Defaults(top_k=3)
    source = generator(how)
    drawn = [choose(x, [how], [source], [[0]], defaults)[0] for _ in range(4000)]
    p = torch.softmax(x[0] / 2, 0)
    p[3] = 0  # top_k
    p /= p.sum()
    want = p if p[[2, 1]].sum() < 0.9 else torch.where(torch.arange(4) > 0, p, 0.0)
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert counts[3] == 0
    assert torch.allclose(counts, want / want.sum(), atol=0.03)


def test_a_stopped_engine_ends_every_answer() -> None:
    e = engine(model(end=None), None, rows=1)
    held, waiting = Held(e, Ask([5], None, 50)), Answer(e, Ask([6], None, 5))
    held.next()
    closing = Thread(target=e.close)
    closing.start()
    while e.alive:
        time.sleep(0.001)
    held.go()
    assert "the server stopped" in held.all()[-1].error
    assert "the server stopped" in waiting.all()[-1].error
    closing.join()
    with pytest.raises(Stopped):
        e.submit(Ask([5]), print)


@pytest.mark.parametrize(
    ("ask", "why"),
    [(Ask([]), "at least one token"), (Ask([1], None, 0), "one to make"), (Ask([1], stops=["x"]), "no tokenizer")],
)
def test_requests_without_a_meaning_are_refused(ask: Ask, why: str, running: Any) -> None:
    with pytest.raises(ValueError, match=why):
        running(model(), None, text=False).submit(ask, print)


def test_a_token_without_a_text_ends_its_own_answer_alone(running: Any) -> None:
    base = model(end=None)
    e, net = running(base, None), pf.adapt(base, {"q_proj": pf.LoRA(1)})
    held = Held(e, Ask([9], None, 2))
    held.next()
    odd, well = Answer(e, Ask([5, 6], None, 5)), Answer(e, Ask([5, 7], None, 5))

    def never(_: int) -> str:
        raise OverflowError("too large")

    odd.ticket.text.add = never  # type: ignore[union-attr,method-assign]
    held.go()
    assert "has no text: OverflowError: too large" in odd.all()[-1].error
    assert well.tokens() == alone(net, None, [5, 7], 5)


def test_a_cache_that_cannot_be_joined_is_made_again(running: Any, monkeypatch: Any) -> None:
    base = model(end=None)
    e, net = running(base, None), pf.adapt(base, {"q_proj": pf.LoRA(1)})
    join, fails = Batch.join_, iter([False, True])

    def sometimes(batch: Batch, other: Batch) -> None:
        if next(fails, False):
            batch.cache.layers[0].keys = batch.cache.layers[0].keys[:0]
            raise RuntimeError("out of memory")
        join(batch, other)

    monkeypatch.setattr(Batch, "join_", sometimes)
    held = Held(e, Ask([9], None, 6))
    first = [*held.next().tokens]
    other = Answer(e, Ask([5, 6], None, 5))
    held.go()
    assert first + held.tokens() == alone(net, None, [9], 6)
    assert other.tokens() == alone(net, None, [5, 6], 5)


def module_nets(base: Any) -> dict[str, pf.Adapted]:
    """Every method at modules and on inputs that this model has a place for, at the first of these that takes it."""
    made = {}
    for method, pattern in product(OURS, ("mlp", "self_attn", r"layers\.\d", "model")):
        name = type(method).__name__
        if method.adapts == "parameter" or name in made:
            continue
        with suppress(ValueError):
            made[name] = pf.adapt(base, {pattern: method})
    return made


def test_every_method_at_modules_and_inputs_is_right_or_refused(tmp_path: Path, running: Any) -> None:
    base = model(end=None)
    e, asked, right = running(base, tmp_path, slots=4, plans=100), prompts(3), []
    refused: list[str] = []
    for name, net in module_nets(base).items():
        pf.save(tmp_path / name, net, a := random(net, 1, scale=0.3))
        try:
            answers = [Answer(e, Ask(p, n, 5)) for p in asked for n in (name, None)]
        except ValueError as why:
            assert re.search("step by step|no stack of adapters", str(why)), why
            refused.append(name)
            continue
        assert [x.tokens() for x in answers[::2]] == [alone(net, a, p, 5) for p in asked], name
        assert [x.tokens() for x in answers[1::2]] == [alone(net, None, p, 5) for p in asked], name
        right.append(name)
    assert {"Bottleneck", "Compacter", "LlamaAdapter", "Side", "LoReFT"} <= set(right), right
    assert {"LlamaPro", "PromptTuning", "PrefixTuning", "DeepPrompt"} <= set(refused), refused
