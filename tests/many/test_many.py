"""Many adapters at once: mixed batches, threads, and training many in one run. (The laws cover every method.)"""

import threading
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from models import by_name, noise, tokens
from optree import tree_leaves, tree_map
from support import close, random, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA, VBLoRA
from peftfn.slots.gates import Index

INDICES = {
    "distinct": [0, 1, 2, 3, 4, 5],
    "permuted": [3, 0, 5, 1, 4, 2],
    "uniform": [0, 1, 2, 0, 1, 2],
    "skewed": [4, 4, 0, 4, 2, 4],
    "identical": [2] * 6,
    "some": [5, -1, 0, -1, 5, 3],
    "base": [-1] * 6,
}


def features(model: Any, x: Tensor) -> Tensor:
    embeds: Tensor = model.get_input_embeddings()(x).detach()
    return embeds


@pytest.mark.parametrize("spread", INDICES)
@pytest.mark.parametrize("length", [1, 5])  # one token a row moves rows, many tokens copy factors
@pytest.mark.parametrize("method", [LoRA(2), DoRA(2), IA3(), OFT(4), LoHa(2), VBLoRA(2, vectors=8, length=4)], ids=str)
def test_every_spread_of_rows(method: pf.Method, length: int, spread: str) -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|down_proj": method})
    many, index, x = [random(net, s) for s in range(6)], INDICES[spread], tokens(6, length)
    with torch.no_grad():
        got = net.mixed(pf.stack(many), index, x).logits
        for i, k in enumerate(index):
            want = (net.apply(many[k], x[i : i + 1]) if k >= 0 else model(x[i : i + 1])).logits
            close(got[i : i + 1], want)
    close(net.mixed(pf.stack(many), torch.tensor(index), x).logits, got)  # with autograd on: other operations


def test_rows_of_one_part_of_the_adapters() -> None:
    rows = Index.of([4, 1, 4, -1, 2], 6)
    assert rows.uses(1, 1)
    assert not rows.uses(3, 1)
    assert not rows.uses(5, 1)


def test_gradients_reach_adapters_and_inputs() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj": LoRA(2), "v_proj": DoRA(2), "norm": Full()})
    s, index = pf.stack([random(net, i) for i in range(3)]), [2, -1, 0, 2]
    e = features(model, tokens(4))

    def loss(s: Any, e: Tensor) -> Tensor:
        return net.mixed(s, index, inputs_embeds=e).logits.square().mean()

    def one_by_one(s: Any, e: Tensor) -> Tensor:
        rows = [
            net.apply(pf.unstack(s)[k], inputs_embeds=row).logits if k >= 0 else model(inputs_embeds=row).logits
            for k, row in zip(index, e.split(1), strict=True)
        ]
        return torch.cat(rows).square().mean()

    (ds, de), (want_s, want_e) = grad(loss, (0, 1))(s, e), grad(one_by_one, (0, 1))(s, e)
    trees_close(ds, want_s, 1e-4)
    close(de, want_e, 1e-4)
    inputs = e.clone().requires_grad_()
    loss(s, inputs).backward()
    close(inputs.grad, want_e, 1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_in_a_mixed_batch(options: Any) -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|v_proj": LoRA(2)})
    many, x = [random(net, i, scale=0.3) for i in range(2)], tokens(3)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    got = net.mixed(pf.stack(many), [1, -1, 0], x, method="generate", **how)
    assert torch.equal(got[:1], net.apply(many[1], x[:1], method="generate", **how))
    assert torch.equal(got[1:2], model.generate(x[1:2], **how))  # type: ignore[operator]
    assert torch.equal(got[2:], net.apply(many[0], x[2:], method="generate", **how))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_tokens_of_experts_that_are_not_followed_are_refused_by_name(name: str) -> None:
    case = by_name[name]
    net = pf.adapt(case.build(), {case.linear: LoRA(2)}, routed=[])
    args, kwargs = case.inputs(2)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\..*experts.*rows.*routed="):
        net.mixed(pf.stack([random(net, i) for i in range(2)]), [0, 1], *args, **kwargs)


def test_threads_are_like_processes() -> None:
    """Eight threads with eight adapters: outputs and gradients, mixed and single calls, bit for bit as alone."""
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|v_proj": DoRA(2), "norm": Full()})
    many, x = [random(net, i) for i in range(8)], tokens(3)
    stacked, index = pf.stack(many), [5, -1, 2]

    def step(k: int) -> list[Tensor]:
        mine = tree_map(lambda t: t.clone().requires_grad_(), many[k])
        y = net.apply(mine, x).logits
        y.square().mean().backward()
        return [y.detach(), *(t.grad for t in tree_leaves(mine)), net.mixed(stacked, index, x).logits]

    alone = [step(k) for k in range(8)]
    wrong: list[Any] = []

    def work(k: int) -> None:
        for turn in range(3):
            if not all(map(torch.equal, step(k), alone[k])):
                wrong.append((k, turn))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.parametrize("route", ["mixed", "gated", "several nets", "bank"])
def test_one_compilation_for_any_adapters_and_inputs_of_one_shape(route: str) -> None:
    """An input's identity or address that is read in traced code would be a guard on that very tensor."""
    _, net, _, _ = regression()
    other = pf.adapt(net.model, {"weight": IA3()})
    bank, counter = pf.Bank([net, other], 3), torch._dynamo.testing.CompileCounter()
    for s in range(6):
        bank.put(f"{s}", net, random(net, s))
        bank.put(f"other {s}", other, random(other, s))
    torch._dynamo.reset()

    def run(stacks: Any, index: Tensor, gates: Tensor, x: Tensor) -> Tensor:
        if route == "mixed":
            out: Tensor = net.mixed(stacks[0], index % 3, x)
        elif route == "gated":
            out = net.gated(stacks[0], gates, x)
        else:
            out = bank.nets.mixed(stacks, index, x)
        return out

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for s in range(4):
        x, gates = noise(3, 8, seed=s), noise(3, 3, seed=s)
        if route == "bank":
            with bank.holding([f"{s}", "__base__", f"other {s + 1}"]) as (stacks, index):
                close(compiled(stacks, index, gates, x), run(stacks, index, gates, x))
            continue
        stacks = [pf.stack([random(n, 3 * s + i) for i in range(3)]) for n in (net, other)]
        index = torch.tensor([[0, -1, 5], [4, 2, 2], [-1, -1, 3], [1, 0, 4]][s])
        close(compiled(stacks, index, gates, x), run(stacks, index, gates, x))
    assert counter.frame_count == 1


# Training many at once.


def regression() -> tuple[nn.Module, pf.Adapted, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).requires_grad_(False)
    return model, pf.adapt(model, {"weight": LoRA(2)}), noise(12, 8), noise(12, 2, seed=2)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_sixteen_learning_rates_in_one_run_are_sixteen_runs(make: Any) -> None:
    _, net, x, t = regression()
    rates = torch.logspace(-4, -1, 16).tolist()

    def loss(a: Any) -> Tensor:
        return (net.apply(a, x) - t).square().mean()

    def fresh() -> Any:
        return tree_map(lambda v: v.clone().requires_grad_(), net.init(3))

    together = [fresh() for _ in rates]
    optimizer = make([{"params": tree_leaves(a), "lr": lr} for a, lr in zip(together, rates, strict=True)])
    for _ in range(6):
        optimizer.zero_grad()
        vmap(loss)(pf.stack(together)).sum().backward()
        optimizer.step()
    for a, lr in zip(together, rates, strict=True):
        b = fresh()
        own = make(tree_leaves(b), lr=lr)
        for _ in range(6):
            own.zero_grad()
            loss(b).backward()
            own.step()
        trees_close(a, b, 1e-4)


def test_a_stack_trains_on_batches_of_its_own() -> None:
    """One optimizer on stacked leaves; adapters see different numbers of rows of a mixed batch."""
    _, net, x, t = regression()
    index = [0] * 7 + [1] * 4 + [2]
    start = [net.init(i) for i in range(3)]
    stacked = tree_map(lambda v: v.requires_grad_(), pf.stack(start))
    optimizer = torch.optim.Adam(tree_leaves(stacked), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (net.mixed(stacked, index, x) - t).square().sum().backward()
        optimizer.step()
    for k, (a, rows) in enumerate(zip(start, [slice(0, 7), slice(7, 11), slice(11, 12)], strict=True)):
        own = tree_map(lambda v: v.clone().requires_grad_(), a)
        optimizer = torch.optim.Adam(tree_leaves(own), lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            (net.apply(own, x[rows]) - t[rows]).square().sum().backward()
            optimizer.step()
        trees_close(pf.unstack(stacked)[k], own, 1e-4)


def test_dropout_is_drawn_for_each_adapter_and_row() -> None:
    model, _, x, _ = regression()
    net = pf.adapt(model.train(), {"weight": LoRA(4, dropout=0.5)})
    one = random(net, 1)
    same = x[:1].expand(4, -1)
    torch.manual_seed(0)
    rows = [net.mixed(pf.stack([one] * 4), index, same) for index in ([0, 1, 2, 3], [0] * 4)]
    rows.append(vmap(net.apply, (0, None), randomness="different")(pf.stack([one] * 4), same[0]))
    for y in rows:
        assert len({tuple(r.tolist()) for r in y}) == 4
    model.eval()
    assert torch.allclose(net.mixed(pf.stack([one] * 4), [0, 1, 2, 3], same), net.apply(one, same), atol=1e-6)


STACKS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda a: [], ValueError, "at least one"),
    "no adapter": (lambda a: [a, None], TypeError, "NoneType in adapter 1"),
    "no tensor": (lambda a: [a, {"weight": {"a": 1.0, "b": a["weight"]["b"]}}], TypeError, "weight/a is a float"),
    "other sites": (lambda a: [a, {"bias": a["weight"]}], ValueError, "0 and 1 differ at weight, which"),
    "another rank": (
        lambda a: [a, a, {"weight": {"a": torch.ones(3, 4), "b": torch.ones(4, 3)}}],
        ValueError,
        r"weight/a has shape \[2, 4\] in adapter 0 and \[3, 4\] in adapter 2: .*conform",
    ),
    "another type": (
        lambda a: [a, {"weight": {k: t.double() for k, t in a["weight"].items()}}],
        ValueError,
        "weight/a is torch.float32 on cpu in adapter 0 and torch.float64 on cpu in adapter 1",
    ),
    "one adapter": (lambda a: a, TypeError, "this is one adapter, with the site 'weight'"),
    "a sum alone": (lambda a: pf.add(a, a), TypeError, "this is one adapter, with the site 'weight'"),
    "a number": (lambda a: 3, TypeError, "not a int"),
    "by name": (
        lambda a: {"ann": a, "bob": {"bias": a["weight"]}},
        ValueError,
        "adapters 'ann' and 'bob' differ at weight",
    ),
    "a sum": (lambda a: [a, pf.add(a, a)], ValueError, "0 and 1 differ at weight/a, which"),
}


@pytest.mark.parametrize("what", STACKS)
def test_what_does_not_stack(what: str) -> None:
    a = pf.adapt(nn.Linear(4, 4), {"weight": LoRA(2)}).init()
    make, error, match = STACKS[what]
    with pytest.raises(error, match=f"stack: .*{match}"):
        pf.stack(make(a))


def test_a_stack_keeps_the_order_of_names_and_is_a_value() -> None:
    a = {"z": {"b": torch.ones(2), "a": torch.zeros(1)}, "c": {"x": torch.ones(3)}}
    s = pf.stack([a, tree_map(lambda t: t + 1, a)])
    assert list(s) == ["z", "c"]
    assert list(s["z"]) == ["b", "a"]
    assert s["c"]["x"].tolist() == [[1.0] * 3, [2.0] * 3]
    s["c"]["x"].zero_()
    assert a["c"]["x"].tolist() == [1.0] * 3


def test_names_in_an_index_are_refused_with_the_cure() -> None:
    net = pf.adapt(nn.Linear(4, 4), {"weight": LoRA(2)})
    with pytest.raises(TypeError, match=r"mixed: index has the name 'ann'; .*peftfn\.bank"):
        net.mixed(pf.stack({"ann": net.init()}), ["ann", -1], torch.ones(2, 4))  # type: ignore[list-item]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(s, t) for s, t in zip(pf.leaves(a), pf.leaves(b), strict=True))


def test_any_iterable_or_dict_of_adapters_stacks_and_a_dict_comes_back() -> None:
    net = pf.adapt(nn.Linear(4, 4), {"weight": LoRA(2)})
    adapters = [random(net, i) for i in range(3)]
    named = dict(zip(("ann", "bob", "eve"), adapters, strict=True))
    for given in (tuple(adapters), iter(adapters), (a for a in adapters), named, named.values()):
        assert same(pf.stack(given), pf.stack(adapters))  # type: ignore[arg-type]
    back = pf.unstack(pf.stack(named), named)
    assert list(back) == list(named)
    for name, a in named.items():
        assert same(back[name], a)
    sums = [pf.add(a, pf.scale(a, 2.0)) for a in adapters]
    assert same(pf.unstack(pf.stack(sums))[1], sums[1])
    for names in (["ann"], ["ann", "ann", "bob"]):
        with pytest.raises(ValueError, match=r"unstack: .*for 3 adapters"):
            pf.unstack(pf.stack(named), names)


def test_leaves_are_the_tensors_that_an_optimizer_trains() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {"0.weight": LoRA(2), "1": pf.Full()})
    a, x = net.init(), torch.randn(3, 4)
    assert [id(t) for t in pf.leaves(a)] == [id(t) for leaf in a.values() for t in leaf.values()]
    optimizer = torch.optim.SGD([t.requires_grad_() for t in pf.leaves(a)], 0.5)
    before = [t.detach().clone() for t in pf.leaves(a)]
    net.apply(a, x).square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(t, old) for t, old in zip(pf.leaves(a), before, strict=True)]
    assert changed == [False, True, True, True], "A of a fresh LoRA has no gradient, and all others have one"


def test_algebra_takes_adapters_and_numbers() -> None:
    net = pf.adapt(nn.Linear(4, 4), {"weight": LoRA(2)})
    a, x = random(net), torch.ones(1, 4)
    with pytest.raises(TypeError, match="scale: give an adapter and a number, not dict and str"):
        pf.scale(a, "2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scale: .*not list and float"):
        pf.scale([a], 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="add: argument 1 is a NoneType"):
        pf.add(a, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chain: 3 is not a method"):
        pf.chain(3)  # type: ignore[arg-type]
    for odd in ({"scale": torch.tensor(1.0), "of": a["weight"], "a": x}, {"add.0": a["weight"], "add.2": a["weight"]}):
        with pytest.raises(KeyError, match=r"weight: a (scaled leaf|sum) has"):
            net.apply({"weight": odd}, x)
