"""Adapters of different methods, ranks and targets in one batch, by name, in bounded memory."""

import gc
import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from models import by_name, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import close, random, same_state, state, trees_close
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf
from peftfn import OFT, BankBusy, DoRA, Full, LoRA, PiSSA

RULES: dict[str, dict[str, pf.Method]] = {
    "wide": {"q_proj|v_proj|up_proj": LoRA(4, alpha=6.0)},
    "narrow": {"q_proj": LoRA(2)},
    "dora": {"q_proj|o_proj": DoRA(3)},
    "other": {"norm": Full(), "v_proj": OFT(block_size=4), "embed_tokens": LoRA(2, init_weights="gaussian")},
    "many": {r"q_proj|v_proj|up_proj": LoRA(3, rslora=True)},
}
NAMES = ["dora", "__base__", "wide", "other", "narrow", "wide", "many", "other"]


def llama() -> tuple[nn.Module, dict[str, tuple[pf.Adapted, pf.Adapter]]]:
    model = by_name["llama"].build()
    nets = {name: pf.adapt(model, rules) for name, rules in RULES.items()}
    return model, {name: (net, random(net, i)) for i, (name, net) in enumerate(nets.items())}


def one_by_one(model: nn.Module, given: Any, names: list[str], x: Tensor) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        net, a = given.get(name, (None, None))
        rows.append((model(x[i : i + 1]) if net is None else net.apply(a, x[i : i + 1])).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("prepared", [False, True])
def test_rows_of_different_methods_ranks_and_targets(prepared: bool) -> None:
    model, given = llama()
    before, x = state(model), tokens(len(NAMES))
    bank = pf.bank(given, prepared=prepared)
    assert len(bank.nets.nets) < len(given), "wide and many fit one stack"
    close(bank.apply(NAMES, x).logits, one_by_one(model, given, NAMES, x))
    close(bank.apply(["__base__"] * 3, x[:3]).logits, model(x[:3]).logits)
    close(bank.apply(["dora"] * 3, x[:3]).logits, given["dora"][0].apply(given["dora"][1], x[:3]).logits)
    assert same_state(before, state(model))


def test_the_gradient_of_a_batch_of_different_methods() -> None:
    model, given = llama()
    nets, x = pf.Nets([net for net, _ in given.values()]), tokens(len(NAMES))
    index = [list(given).index(n) if n in given else -1 for n in NAMES]
    stacks = [pf.stack([a]) for _, a in given.values()]
    weights = torch.linspace(-1, 1, len(NAMES))[:, None, None]

    def together(stacks: Any) -> Tensor:
        return (nets.mixed(stacks, index, x).logits.square() * weights).sum()

    def apart(stacks: Any) -> Tensor:
        adapters = {n: (net, pf.unstack(s)[0]) for (n, (net, _)), s in zip(given.items(), stacks, strict=True)}
        return (one_by_one(model, adapters, NAMES, x).square() * weights).sum()

    for got, want in zip(grad(together)(stacks), grad(apart)(stacks), strict=True):
        trees_close(got, want, 1e-3)
    gates = torch.randn(len(NAMES), len(given), generator=torch.Generator().manual_seed(0))
    got = nets.gated(stacks, torch.eye(len(given))[[max(i, 0) for i in index]], x).logits
    close(got, nets.mixed(stacks, [max(i, 0) for i in index], x).logits)
    assert nets.gated(stacks, gates, x).logits.isfinite().all()


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate(name: str, how: str) -> None:
    """Each row's tokens are those its adapter generates alone, with every name repeated for its beams."""
    case = by_name[name]
    model = case.build()
    if name == "t5" and how == "static cache":
        how = "greedy"
    rules = [{case.linear: LoRA(2)}, {case.linear: DoRA(3)}]
    nets = [pf.adapt(model, r) for r in rules]
    given = {"a": (nets[0], random(nets[0], 1, scale=0.3)), "b": (nets[1], random(nets[1], 2, scale=0.3))}
    names, x = ["b", "__base__", "a", "b"], tokens(4)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **GENERATE[how]}
    got = pf.bank(given).apply(names, x, method="generate", **options)
    beams = options.get("num_return_sequences", 1)
    for i, n in enumerate(names):
        row = x[i : i + 1]
        if n == "__base__":
            want = model.generate(row, **options)  # type: ignore[operator]
        else:
            want = given[n][0].apply(given[n][1], row, method="generate", **options)
        assert torch.equal(got[i * beams : (i + 1) * beams], want), f"row {i}, {n}"


def test_sampling_draws_from_each_rows_own_adapter() -> None:
    """An adapter that leaves one token possible: its rows sample that token, the others do not all do so."""
    model = by_name["llama"].build()
    net = pf.adapt(model, {"lm_head": Full()})
    sure = net.init()
    sure["lm_head.weight"] = {k: torch.zeros_like(t) for k, t in sure["lm_head.weight"].items()}
    (key,) = sure["lm_head.weight"]
    push = torch.zeros_like(model.lm_head.weight)  # type: ignore[union-attr, arg-type]
    fresh = net.apply(net.init(), tokens(1), output_hidden_states=True).hidden_states[-1][0, -1]
    push[7] = 400 * fresh / fresh.square().sum()
    sure["lm_head.weight"][key] = push
    options = {"method": "generate", "max_new_tokens": 1, "do_sample": True, "num_return_sequences": 8}
    torch.manual_seed(0)
    got = pf.bank({"sure": (net, sure)}).apply(["sure", "__base__"], tokens(1).repeat(2, 1), pad_token_id=0, **options)
    assert (got[:8, -1] == 7).all()
    assert not (got[8:, -1] == 7).all()


def test_the_encoder_and_its_cached_output() -> None:
    case = by_name["t5"]
    model = case.build()
    net = pf.adapt(model, {case.linear: LoRA(2)})
    given = {n: (net, random(net, i)) for i, n in enumerate("ab")}
    kwargs = case.inputs(3)[1]
    got = pf.bank(given).apply(["b", "__base__", "a"], **kwargs)
    for i, n in enumerate(["b", None, "a"]):
        row = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        want = model(**row) if n is None else net.apply(given[n][1], **row)
        close(got.logits[i : i + 1], want.logits)
        close(got.encoder_last_hidden_state[i : i + 1], want.encoder_last_hidden_state)


# Capacity.


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def tiny(capacity: int = 3, **options: Any) -> tuple[nn.Module, pf.Adapted, pf.Bank]:
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    net = pf.adapt(model, {r"weight": LoRA(4)})
    return model, net, pf.Bank([net], capacity, **options)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def test_the_least_recently_used_goes() -> None:
    _, net, bank = tiny(3)
    adapters = {n: random(net, i) for i, n in enumerate("abcde")}
    for n, a in adapters.items():
        bank.put(n, net, a)
    assert bank.names == tuple("abcde")
    assert bank.resident == ()
    bank.apply(["a", "b", "c", "a"], X)
    bank.apply(["a"] * 4, X)
    assert bank.resident == ("b", "c", "a")
    bank.apply(["d"] * 4, X)
    assert bank.resident == ("c", "a", "d")
    assert bank.evict() == "c"
    assert bank.evict("d") == "d"
    assert bank.resident == ("a",)
    for names in (["e", "d", "__base__", "e"], ["b", "e", "a", "a"], ["c", "__base__", "b", "c"]):
        got = bank.apply(names, X)
        want = [net.apply(adapters[n], x) if n in adapters else net.model(x) for n, x in zip(names, X, strict=True)]
        close(got, torch.stack(want))
    bank.remove("c")
    assert "c" not in bank.names
    with pytest.raises(KeyError, match=r"row 1: .*'c'"):
        bank.apply(["a", "c", "a", "a"], X)
    with pytest.raises(KeyError, match="not resident"):
        bank.evict("c")


def test_smaller_adapters_and_files_are_fetched_exactly(tmp_path: Path) -> None:
    model, wide, bank = tiny(2)
    small = pf.adapt(model, {r"one\.weight": LoRA(2, alpha=5.0)})
    a, b, c = random(wide, 1), random(small, 2), random(small, 3)
    pf.save(tmp_path / "a", wide, a)
    pf.save(tmp_path / "b", small, b)
    bank.put("a", wide, tmp_path / "a")
    bank.put("b", small, tmp_path / "b")
    bank.put("c", small, c)
    for names in (["a", "b", "b", "a"], ["c", "c", "b", "__base__"], ["a", "c", "__base__", "a"]):
        nets: dict[str, Any] = {"a": (wide, a), "b": (small, b), "c": (small, c)}
        want = [nets[n][0].apply(nets[n][1], x) if n in nets else model(x) for n, x in zip(names, X, strict=True)]
        close(bank.apply(names, X), torch.stack(want))
    pf.save(tmp_path / "b", wide, random(wide, 4))  # the file becomes another plan's
    bank.evict("c")
    with pytest.raises(ValueError, match=r"adapter\.safetensors: one\.weight: .*rank=4.*rank=2"):
        bank.apply(["b"] * 4, X)
    close(bank.apply(["a"] * 4, X), wide.apply(a, X))


@pytest.mark.parametrize("format", ["native", "peft", "swift"])
def test_a_path_alone_says_its_net(format: str, tmp_path: Path) -> None:
    """Files of any format, with alpha written down or not; nets of one meaning are one net."""
    model, _, bank = tiny(2)
    plans = {"a": LoRA(4), "b": LoRA(4, alpha=4.0), "c": LoRA(2, alpha=3.0), "d": LoRA(4, alpha=2.0, rslora=True)}
    given = {n: ((net := pf.adapt(model, {"weight": m})), random(net, i)) for i, (n, m) in enumerate(plans.items())}
    for name, (net, a) in given.items():
        pf.save(tmp_path / name, net, a, format=format)
        path = tmp_path / name / "default" if format == "swift" and (tmp_path / name / "default").is_dir() else name
        bank.put(name, str(tmp_path / path))
    for names in (["a", "b", "b", "a"], ["c", "d", "c", "__base__"], ["a", "d", "__base__", "a"]):
        want = [given[n][0].apply(given[n][1], x) if n in given else model(x) for n, x in zip(names, X, strict=True)]
        close(bank.apply(names, X), torch.stack(want))
    bank.put("with its net", given["a"][0], tmp_path / "b")  # alpha=4 and no alpha mean the same at rank 4
    close(bank.apply(["with its net"] * 4, X), given["b"][0].apply(given["b"][1], X))
    with pytest.raises(ValueError, match=r"one\.weight: the file was saved with .*alpha=3"):
        bank.put("c", given["a"][0], tmp_path / "c")
    pf.save(tmp_path / "a", *given["c"], format=format)  # the file becomes another plan's
    bank.apply(["c", "d", "c", "d"], X)  # "a" goes from the slots
    assert "a" not in bank.resident
    with pytest.raises(ValueError, match=r"'a': .*one\.weight: the file was saved with .*alpha=3"):
        bank.apply(["a"] * 4, X)


def test_constants_of_a_file_are_compared(tmp_path: Path) -> None:
    vera = pf.adapt(Tiny(), {"weight": pf.VeRA(rank=2)})
    a = random(vera, 1)
    bank = pf.Bank([vera], 1)
    pf.save(tmp_path / "a", vera, a, format="peft")
    bank.put("a", tmp_path / "a")
    close(bank.apply(["a"] * 4, X), vera.apply(a, X))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] += 1  # PEFT's file has the projections
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the net it is put with has .*, or other constants"):
        bank.put("b", vera, tmp_path / "a")


def test_one_bad_name_fails_alone_if_asked(tmp_path: Path) -> None:
    _, net, bank = tiny(2)
    good = random(net, 1)
    for name in ("gone", "cut", "good"):
        pf.save(tmp_path / name, net, good, format="peft" if name == "cut" else "native")
        bank.put(name, tmp_path / name)
    (tmp_path / "gone" / "adapter.safetensors").unlink()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"xx")
    names = ["good", "gone", "nobody", "cut"]
    bad = bank.fetch([*names, "__base__"])
    assert {n: type(e) for n, e in bad.items()} == {"gone": FileNotFoundError, "nobody": KeyError, "cut": ValueError}
    assert "near" in str(bad["nobody"]) and "'cut': " in str(bad["cut"]) and bank.resident == ("good",)
    y = bank.apply(["__base__" if n in bad else n for n in names], X)
    close(y, torch.cat([net.apply(good, X[:1]), net.model(X[1:])]))
    with bank.holding(["good"]), bank.holding(["good"]):
        bank.put("other", net, good)
        assert bank.fetch(["other"]) == {}
        assert bank.resident == ("good", "other")
    with bank.holding(["good", "other"]):
        bank.put("third", net, good)
        assert isinstance(bank.fetch(["third"])["third"], BankBusy)


def test_a_bank_says_what_it_holds() -> None:
    _, net, bank = tiny(2)
    assert len(bank) == 0 and "a" not in bank
    for name in "abc":
        bank.put(name, net, net.init())
    bank.apply(["a", "b", "a", "a"], X)
    assert len(bank) == 3 and "a" in bank and "__base__" not in bank and 3 not in bank
    assert repr(bank) == "Bank(3 adapters, 2 of them in 2 slots, 1 net of Tiny)"
    bank.remove("a")
    assert "a" not in bank and len(bank) == 2


def test_what_is_put_is_a_value() -> None:
    """What its owner does to the tensors later is not seen, whether the adapter is in a slot or waits."""
    _, net, bank = tiny(1)
    a = random(net, 1)
    bank.put("a", net, a)
    bank.put("b", net, random(net, 2))
    want = bank.apply(["a"] * 4, X)
    [t.mul_(2) for leaf in a.values() for t in leaf.values()]
    bank.apply(["b"] * 4, X)
    assert torch.equal(bank.apply(["a"] * 4, X), want)


def test_a_file_saved_with_another_plan_is_refused_before_it_is_used(tmp_path: Path) -> None:
    """Another alpha, or other constants, have the same tensors: nothing but the plan tells them apart."""
    model, net, bank = tiny(1)
    other, pissa = pf.adapt(model, {"weight": LoRA(4, alpha=64)}), pf.adapt(model, {"weight": PiSSA(2)})
    pf.save(tmp_path / "a", other, random(other))
    elsewhere = pf.adapt(Tiny(), {"weight": PiSSA(2)})
    pf.save(tmp_path / "p", elsewhere, random(elsewhere))
    with pytest.raises(ValueError, match=r"one\.weight: the file was saved with .*alpha=64.*peftfn\.load"):
        bank.put("a", net, tmp_path / "a")
    with pytest.raises(ValueError, match=r"one\.weight: its constant .* differs from the net's"):
        pf.Bank([pissa], 1).put("p", pissa, tmp_path / "p")
    dropped = pf.adapt(model, {"weight": LoRA(4, dropout=0.1)})  # how it was trained does not matter
    pf.save(tmp_path / "a", dropped, random(dropped, 3))
    bank.put("a", net, tmp_path / "a")
    close(bank.apply(["a"] * 4, X), net.apply(random(dropped, 3), X))
    pf.save(tmp_path / "a", other, random(other))
    bank.put("b", net, random(net))
    bank.apply(["b"] * 4, X)
    with pytest.raises(ValueError, match=r"one\.weight: the file was saved with .*alpha=64"):
        bank.apply(["a"] * 4, X)


def test_a_file_that_is_gone_or_cut_short_is_told_by_name_and_leaves_the_slots(tmp_path: Path) -> None:
    _, net, bank = tiny(1)
    pf.save(tmp_path, net, random(net, 1))
    bank.put("on disk", net, tmp_path)
    bank.put("b", net, random(net, 2))
    want, file = bank.apply(["b"] * 4, X), tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"'on disk': .* no longer exists.*bank\.remove\('on disk'\)"):
        bank.apply(["on disk"] * 4, X)
    for cut in (whole[:50], b""):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r"'on disk': .*not a valid safetensors file"):
            bank.apply(["on disk"] * 4, X)
    assert bank.resident == ("b",)
    assert torch.equal(bank.apply(["b"] * 4, X), want)
    file.write_bytes(whole)
    close(bank.apply(["on disk"] * 4, X), net.apply(random(net, 1), X))


def test_putting_into_a_bank_of_prepared_adapters_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read every weight of the base, and the result is thrown away."""
    model, _, _ = tiny(1)
    net = pf.adapt(model, {"weight": DoRA(2)})
    bank, a, seen = pf.Bank([net], 1, prepared=True), random(net, 1), []
    prepare = pf.Adapted.prepare
    monkeypatch.setattr(pf.Adapted, "prepare", lambda *args: (seen.append(1), prepare(*args))[1])
    bank.put("a", net, a)
    assert not seen
    close(bank.apply(["a"] * 4, X), net.apply(a, X))
    assert seen
    bank.put("ready", net, net.prepare(a))
    close(bank.apply(["ready"] * 4, X), net.apply(a, X))
    with pytest.raises(ValueError, match="no fixed shape"):
        bank.put("sum", net, pf.add(a, a))


def test_ten_thousand_adapters_in_the_memory_of_thirty_two(tmp_path: Path) -> None:
    net = pf.adapt(tiny()[0], {"weight": LoRA(64)})
    bank = pf.Bank([net], 32)
    folder, adapter = tmp_path / "one", random(net, 1)
    pf.save(folder, net, adapter)
    size = sum(t.numel() * t.element_size() for leaf in adapter.values() for t in leaf.values())
    bank.apply(["__base__"] * len(X), X)  # the first call makes what all calls use
    gc.collect()
    tracemalloc.start()
    tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    for i in range(10_000):
        bank.put(f"user {i}", net, folder)
    spent = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert spent < 10_000 * size / 8, "registered adapters are in memory"
    for start in range(0, 10_000, 997):
        names = [f"user {(start + 31 * i) % 10_000}" for i in range(32)]
        close(bank.apply(names, X.repeat(8, 1)), net.apply(adapter, X.repeat(8, 1)))
    assert len(bank.resident) == 32
    gc.collect()
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) <= tensors + 8, "fetched adapters were kept"
    rooms = [t for slots in bank._register.slots for leaf in slots.stack.values() for t in leaf.values()]
    assert sum(t.untyped_storage().nbytes() for t in rooms) == 32 * size


@pytest.mark.parametrize("prepared", [False, True])
def test_a_bank_that_grows_keeps_what_is_registered_and_resident(prepared: bool, tmp_path: Path) -> None:
    """Also under a running call, and without a second look at the files of what is resident."""
    model, wide, _ = tiny()
    small = pf.adapt(model, {r"one\.weight": LoRA(2, alpha=5.0)})
    other = pf.adapt(model, {"weight": OFT(block_size=4)})
    bank = pf.Bank([small, other], [2, 1], prepared=prepared)
    nets: dict[str, pf.Adapted] = {"a": small, "b": small, "c": small, "o": other, "w": wide}
    given = {n: (net, random(net, i)) for i, (n, net) in enumerate(nets.items())}
    for n in "abco":
        pf.save(tmp_path / n, *given[n])
        bank.put(n, tmp_path / n)

    def check(names: list[str]) -> None:
        close(
            bank.apply(names, X),
            torch.stack([given[n][0].apply(given[n][1], x) for n, x in zip(names, X, strict=True)]),
        )

    check(["c", "b", "o", "b"])
    before = bank.nets
    with bank.holding(["o", "b", "__base__", "b"]) as (stacks, index):
        bank.grow(wide, 3, instead=[small])
        assert bank.nets.nets == (other, wide)
        y = before.mixed(stacks, index, X)
    close(y[:2], torch.stack([given[n][0].apply(given[n][1], x) for n, x in zip("ob", X, strict=False)]))
    assert bank.resident == (("o",) if prepared else ("o", "c", "b"))
    if not prepared:
        for n in "cb":
            (tmp_path / n / "adapter.safetensors").rename(tmp_path / n / "away")
        check(["c", "b", "o", "c"])
        for n in "cb":
            (tmp_path / n / "away").rename(tmp_path / n / "adapter.safetensors")
    bank.put("w", *given["w"])
    assert bank.names == ("a", "b", "c", "o", "w")
    check(["a", "b", "w", "o"])
    check(["c", "w", "o", "c"])
    assert not any(s.pins or s.retired for s in bank._register.slots)


BAD_GROWTH: dict[str, tuple[Any, str]] = {
    "capacity": (lambda b, net: b.grow(net, 0), "capacity is 0"),
    "another model": (lambda b, net: b.grow(tiny()[1], 1), "another model"),
    "not its net": (
        lambda b, net: b.grow(net, 1, instead=[pf.adapt(net.model, {"one": LoRA(1)})]),
        "none of bank.nets",
    ),
    "too narrow": (
        lambda b, net: b.grow(pf.adapt(net.model, {"weight": LoRA(2)}), 1, instead=[net]),
        r"cannot hold .* exactly\. one\.weight: a has shape \[4, 8\]",
    ),
}


@pytest.mark.parametrize("what", BAD_GROWTH)
def test_a_bank_that_cannot_grow_stays_as_it_was(what: str) -> None:
    _, net, bank = tiny(2)
    bank.put("a", net, a := random(net, 1))
    bank.apply(["a"] * 4, X)
    act, match = BAD_GROWTH[what]
    with pytest.raises(ValueError, match=match):
        act(bank, net)
    assert bank.nets.nets == (net,) and bank.resident == ("a",)
    close(bank.apply(["a"] * 4, X), net.apply(a, X))


def test_swapping_compiles_nothing_anew() -> None:
    model, net, bank = tiny(2)
    small = pf.adapt(model, {r"two\.weight": LoRA(1, alpha=3.0)})
    given: dict[str, Any] = {n: (net, random(net, i)) for i, n in enumerate("abc")} | {"s": (small, random(small, 9))}
    for n, (its, a) in given.items():
        bank.put(n, its, a)
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(bank.nets.mixed, fullgraph=True, backend=backend)
    for names in (["a", "b", "a", "__base__"], ["c", "s", "s", "c"], ["s"] * 4, ["b", "c", "__base__", "c"]):
        with bank.holding(names) as (stacks, index):
            got = run(stacks, index, X)
        rows = zip(names, X, strict=True)
        close(got, torch.stack([given[n][0].apply(given[n][1], x) if n in given else model(x) for n, x in rows]))
    assert len(compiled) == 1


def test_many_readers_while_one_puts() -> None:
    """No call ever sees half of an adapter, or another one: each name has two versions, and rows are one of them."""
    _model, net, bank = tiny(6)
    versions = {n: [random(net, 2 * i), random(net, 2 * i + 1)] for i, n in enumerate("abcdefgh")}
    want = {n: [net.apply(a, X) for a in both] for n, both in versions.items()}
    for n, both in versions.items():
        bank.put(n, net, both[0])
    done, wrong, busy = threading.Event(), [], 0

    def read(seed: int) -> None:
        nonlocal busy
        g = torch.Generator().manual_seed(seed)
        while not done.is_set():
            names = [list(versions)[int(k)] for k in torch.randint(0, 8, (2,), generator=g)]
            rows = names * 2
            try:
                y = bank.apply(rows, X)
            except ValueError as e:  # more adapters are in use than there are slots
                assert "running calls" in str(e)
                busy += 1
                continue
            for i, n in enumerate(rows):
                if not any(torch.allclose(y[i], w[i], atol=1e-5) for w in want[n]):
                    wrong.append((n, i))

    readers = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    [t.start() for t in readers]
    for turn in range(150):
        n = list(versions)[turn % 8]
        bank.put(n, net, versions[n][(turn // 8) % 2])
    done.set()
    [t.join() for t in readers]
    assert not wrong
    assert all(not slots.pins and not slots.retired for slots in bank._register.slots)
    assert all(len(slots.free) + len(slots.names) == slots.capacity for slots in bank._register.slots)


def test_threads_that_wait_for_slots_all_get_them() -> None:
    _, net, bank = tiny(4)
    adapters = [random(net, i) for i in range(8)]
    for i, a in enumerate(adapters):
        bank.put(str(i), net, a)
    wrong: list[Any] = []

    def work(first: int) -> None:
        mine = range(first, first + 4)
        want = torch.stack([net.apply(adapters[i], x) for i, x in zip(mine, X, strict=True)])
        try:
            for _ in range(20):
                close(bank.apply([str(i) for i in mine], X, timeout=60.0), want)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 4, 2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    with bank.holding([str(i) for i in range(4)]):
        for timeout in (0.0, 0.05):
            with pytest.raises(BankBusy, match=r"'4': .* all 4 slots.*timeout=seconds"):
                bank.apply(["4"] * 4, X, timeout=timeout)
    assert not any(slots.pins for slots in bank._register.slots)


def broken(folder: Path, what: str) -> None:
    """A saved adapter with one thing wrong in it."""
    file, config = folder / "adapter.safetensors", folder / "peftfn.json"
    tensors, metadata = load_file(file), safe_open(file, framework="pt").metadata()
    site = "adapter/one.weight/"
    if what == "NaN":
        tensors[site + "b"][0, 0] = float("nan")
    elif what == "header":
        file.write_bytes(b"xx")
        return
    elif what == "another save":
        metadata["id"] = "0" * 16
    elif what == "stray":
        tensors["adapter/three.weight/a"] = torch.zeros(2)
    elif what == "lacks":
        del tensors[site + "b"]
    elif what == "shape":
        tensors[site + "b"] = torch.zeros(3, 3)
    elif what == "integers":
        tensors[site + "b"] = tensors[site + "b"].int()
    elif what == "configuration":
        config.write_text("{}")
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    "what", ["NaN", "header", "another save", "stray", "lacks", "shape", "integers", "configuration"]
)
def test_a_bank_refuses_what_load_refuses(tmp_path: Path, what: str) -> None:
    """And in the same words, whether the file is so when it is put or becomes so later."""
    model, net, bank = tiny(1)
    pf.save(tmp_path, net, random(net, 1))
    bank.put("good", net, tmp_path)
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=r"adapter\.safetensors|peftfn\.json") as refused:
        pf.load(tmp_path, model)

    def put_and_use() -> None:
        bank.put("bad", net, tmp_path)
        bank.apply(["bad"] * 4, X)

    with pytest.raises(ValueError, match=re.escape(str(refused.value))):
        put_and_use()
    if what != "configuration":  # which nobody reads again for tensors of the plan that was checked
        with pytest.raises(ValueError, match=re.escape(str(refused.value))):
            bank.apply(["good"] * 4, X)
    assert bank.resident == ()


def test_what_is_held_is_not_overwritten() -> None:
    _, net, bank = tiny(2)
    a, b = random(net, 1), random(net, 2)
    bank.put("a", net, a)
    bank.put("b", net, b)
    with bank.holding(["a", "b"]) as (stacks, index):
        before = {k: t.clone() for k, t in stacks[0]["one.weight"].items()}
        bank.put("a", net, b)
        bank.put("c", net, a)
        with pytest.raises(ValueError, match=r"'c': running calls read all 2 slots"):
            bank.apply(["c"] * 4, X)
        with pytest.raises(ValueError, match="no resident adapter is idle"):
            bank.evict()
        assert all(torch.equal(t, stacks[0]["one.weight"][k]) for k, t in before.items())
        assert index.tolist() == [0, 1]
    close(
        bank.apply(["c", "a", "c", "a"], X),
        torch.stack([net.apply({"c": a, "a": b}[n], x) for n, x in zip("caca", X, strict=True)]),
    )


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no name": (lambda bank, net: bank.apply(["a", None, "a", "a"], X), TypeError, r"row 1: .*'__base__' for the base"),
    "unknown name": (lambda bank, net: bank.apply(["a", "aa", "a", "a"], X), KeyError, r"row 1: .*'aa'.*near: a"),
    "too many": (lambda bank, net: bank.apply([*list("abc"), "a"], X), ValueError, r"'c': .*3 adapters.*2 slots"),
    "wrong length": (lambda bank, net: bank.apply(["a"] * 3, X), ValueError, r"3 entries.*\[4, 8\]"),
    "reserved": (lambda bank, net: bank.put("__base__", net, net.init()), ValueError, "cannot name an adapter"),
    "no file": (lambda bank, net: bank.put("f", net, "/no/such/folder"), FileNotFoundError, "f: "),
    "too wide": (
        lambda bank, net: bank.put("w", pf.adapt(net.model, {"weight": LoRA(5)}), {}),
        ValueError,
        r"one\.weight.*\[5, 8\].*larger rank",
    ),
    "other method": (
        lambda bank, net: bank.put("w", pf.adapt(net.model, {"weight": OFT(2)}), {}),
        ValueError,
        r"one\.weight.*OFT.*LoRA",
    ),
    "scaled": (lambda bank, net: bank.put("w", net, pf.scale(net.init(), 2.0)), ValueError, r"w: one\.weight.*scaling"),
    "no tensor": (lambda bank, net: bank.apply(["a"] * 4, object()), TypeError, "linear"),
    "capacity": (lambda bank, net: pf.Bank([net], 0), ValueError, "capacity is 0"),
    "nothing": (lambda bank, net: pf.bank({}), ValueError, "at least one"),
    "other model": (lambda bank, net: pf.Nets([net, tiny()[1]]), ValueError, "one model object"),
    "a net": (lambda bank, net: pf.Bank(net, 2), TypeError, r"Bank: give a list of nets.*this is a Adapted"),
    "no nets": (lambda bank, net: pf.Nets([net, net.model]), TypeError, r"Nets: give a list of nets.*this is a Tiny"),
    "no net": (lambda bank, net: bank.put("w", net.model, net.init()), TypeError, "'w': .*net is a Tiny"),
    "None": (
        lambda bank, net: bank.apply(["a", None], X),
        TypeError,
        "row 1: .*not NoneType: .*'__base__' for the base",
    ),
    "numbers": (lambda bank, net: bank.apply([0, 1], X), TypeError, "row 0: a name is a string, not int"),
    "the input first": (lambda bank, net: bank.apply(X, ["a"]), TypeError, "row 0: a name is a string, not Tensor"),
    "no names": (lambda bank, net: bank.apply(None, X), TypeError, "names is a NoneType; give a list"),
    "one string": (lambda bank, net: bank.apply("aaaa", X), TypeError, "names is the string 'aaaa'; give a list"),
    "no pairs": (lambda bank, net: pf.bank({"a": net.init()}), TypeError, r"name → \(net, adapter\)"),
    "one stack": (
        lambda bank, net: bank.nets.mixed(pf.stack([net.init()]), [0], X),
        ValueError,
        "give a list, one stack a net",
    ),
    "stacks": (lambda bank, net: bank.nets.mixed([], [0], X), ValueError, "1 nets, and you gave 0 stacks"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    _, net, bank = tiny(2)
    for i, n in enumerate("abc"):
        bank.put(n, net, random(net, i))
    act, error, match = BAD[what]
    with pytest.raises(error, match=match):
        act(bank, net)
    assert bank.names == ("a", "b", "c")
    bank.apply(["a", "b", "b", "a"], X)
