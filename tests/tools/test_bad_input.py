"""Bad input, one table: what does not fit is an early error that names where and how to mend it, and changes nothing.

Ranks, methods that do not convert, gates that miss a site, adapters of different bases, streams that are empty, end
early or are no streams, trees of another net: at every function of routing, merging, starts, steps and the tools.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import random, same_state, state
from torch import Tensor, nn

import peftfn as pf

M, S, R, T = pf.merging, pf.starts, pf.routing, pf.steps


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()


BASE, OTHER = model(), model()
NET, FOREIGN = (pf.adapt(m, {"weight": pf.LoRA(rank=2)}) for m in (BASE, OTHER))
HALF = pf.adapt(BASE, {"0.weight": pf.LoRA(rank=2)})
LILY = pf.adapt(BASE, {"0.weight": pf.Lily(rank=2)})
IA3 = pf.adapt(BASE, {"weight": pf.IA3()})
MANY, FEW = (pf.stack([random(net, s) for s in range(3)]) for net in (NET, HALF))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def wide(rank: int) -> pf.Adapted:
    return pf.adapt(BASE, {"weight": pf.LoRA(rank=rank)})


def square(out: Tensor, batch: Any) -> Tensor:
    return out.square().mean()


def broken() -> Iterator[Tensor]:
    yield X
    raise OSError("the file ended")


MERGES: dict[str, Callable[..., Any]] = {
    "linear": M.linear,
    "magnitude": partial(M.magnitude, density=0.5, space="core"),
    "ties": partial(M.ties, space="core"),
    "ties, shared": partial(M.ties, space="shared", rank=1),
    "dare": partial(M.dare, density=0.5, space="core"),
    "della": partial(M.della, density=0.5, epsilon=0.1, space="core"),
    "tsv": M.tsv,
    "iso_c": M.iso_c,
}
STREAMS: dict[str, Callable[[Any], Any]] = {
    "eva": lambda batches: S.eva(wide(1), batches),
    "corda": lambda batches: S.corda(NET, batches),
    "lora_ga": lambda batches: S.lora_ga(wide(1), batches, loss=square),
    "lora_one": lambda batches: S.lora_one(NET, batches, loss=square),
    "gradient_ranks": lambda batches: pf.suggest.gradient_ranks(NET, batches, loss=square),
}
STARTS: dict[str, Callable[[pf.Adapted], Any]] = {
    "orthogonal": S.orthogonal,
    "eva": lambda net: S.eva(net, [X]),
    "corda": lambda net: S.corda(net, [X]),
    "lora_ga": lambda net: S.lora_ga(net, [X], loss=square),
    "lora_one": lambda net: S.lora_one(net, [X], loss=square),
    "loftq": lambda net: S.loftq(net, torch.round),
}
OF_PAIRS: dict[str, Callable[[pf.Adapted], pf.steps.Step]] = {
    "lora_fa": T.lora_fa,
    "riemannian": T.riemannian,
    "lora_pro": T.lora_pro,
    "lora_muon": lambda net: T.lora_muon(net, 0.1),
    "lora_rite": lambda net: T.lora_rite(net, 0.1),
    "loft": lambda net: T.loft(net, 0.1),
}
CHANGES: dict[str, Callable[[pf.Adapted, Any], Any]] = {
    "to_lora": lambda net, a: pf.to_lora(net, a, rank=1),
    "merge_report": pf.merge_report,
    "intruders": pf.intruders,
    "spectrum": pf.spectrum,
    "reduce_intruders": lambda net, a: pf.reduce_intruders(net, a, rank=1),
    "arrow": lambda net, a: R.arrow(net, pf.stack([a, a])),
}
Case = tuple[Callable[[], Any], type[Exception], str]


def cases() -> dict[str, Case]:
    out: dict[str, Case] = {}

    def case(name: str, call: Callable[[], Any], kind: type[Exception], match: str) -> None:
        assert name not in out
        out[name] = call, kind, match

    for n, merge in MERGES.items():
        case(f"{n}: rank", partial(merge, [(NET, NET.init())], rank=9), ValueError, r"0\.weight: rank is 9.*<= 6")
        case(f"{n}: method", partial(merge, [(LILY, LILY.init())]), ValueError, r"0\.weight: Lily.*on the input")
        pairs = [(NET, NET.init()), (FOREIGN, FOREIGN.init())]
        case(f"{n}: bases", partial(merge, pairs), ValueError, "adapters 0 and 1 are of two models; load or adapt both")
        case(f"{n}: another net's", partial(merge, [(NET, HALF.init())]), KeyError, r"2\.weight.*made for other rules")
        case(f"{n}: none", partial(merge, []), ValueError, "at least one")
    for n, read in STREAMS.items():
        case(f"{n}: empty", partial(read, []), ValueError, "batches is empty; give at least one")
        case(f"{n}: one batch", partial(read, X), TypeError, r"a Tensor; give an iterable.*\[batch\]")
        case(f"{n}: a mapping", partial(read, {"input": X}), TypeError, "a dict; give an iterable")
        case(f"{n}: nothing", partial(read, None), TypeError, "a NoneType; give an iterable")
        case(f"{n}: nan", partial(read, [X * float("nan")]), ValueError, r"\d\.weight: its \w+ in batch 1 .*not finite")
        case(f"{n}: no rows", partial(read, [X[:0]]), ValueError, r"batch 1 has no tokens|gradient is zero")
        case(f"{n}: the stream's own", lambda read=read: read(broken()), OSError, "the file ended")
    for n, start in STARTS.items():
        rank = 3 if n == "lora_ga" else 6
        most = r"give <= 2" if n == "lora_ga" else "give rank <= 4"
        case(f"{n}: rank", partial(start, wide(rank)), ValueError, rf"2\.weight: rank is {rank}.*{most}")
        case(f"{n}: method", partial(start, IA3), ValueError, f"{n}: the net has no LoRA")
    for n, step in OF_PAIRS.items():
        case(f"{n}: no pairs", partial(step, IA3), ValueError, f"{n}: the net has no LoRA")

        def foreign(step: Any = step) -> None:
            made = step(NET)
            made.update(HALF.init(), made.init(NET.init()), NET.init())

        case(f"{n}: another net's gradients", foreign, KeyError, r"2\.weight is missing.*of the same adapter")
    for n, change in CHANGES.items():
        case(f"{n}: method", partial(change, LILY, LILY.init()), ValueError, r"0\.weight: Lily.*depends on the input")
        case(f"{n}: another net's", partial(change, NET, HALF.init()), KeyError, r"2\.weight.*made for other rules")

    gate = {"0.weight": torch.zeros(3, 8), "2.weight": torch.zeros(3, 6)}
    gated = partial(NET.gated, MANY)
    short, long = gate | {"0.weight": torch.zeros(3, 7)}, gate | {"2.weight": torch.zeros(4, 6)}
    for n, gates, match in (
        ("a mapping", {"0": torch.ones(3)}, r"no pattern of the gates matches 2\.weight"),
        ("a tensor", torch.ones(4), "for 4 adapters, and the stack has 3"),
        ("a function", lambda site, x: torch.ones(len(x), 4), r"0\.weight: the function of gates returns"),
        ("phatgoose, a site", R.phatgoose({"0.weight": gate["0.weight"]}), r"2\.weight has no vectors.*\[experts, 6\]"),
        ("phatgoose, a size", R.phatgoose(short), r"0\.weight: the vectors are \[3, 7\]"),
        ("phatgoose, a number", R.phatgoose(long), r"2\.weight: the function of gates returns .*4"),
        ("sigmoid_gate, a site", R.sigmoid_gate({"0.weight": torch.zeros(8)}), r"0\.weight: the function of gates"),
        ("arrow, a site", R.arrow(HALF, FEW), r"2\.weight has no vectors"),
    ):
        case(f"gates miss: {n}", partial(gated, gates, X), ValueError, match)
    one = pf.stack([NET.init()])
    half = R.sigmoid_gate({"0.weight": torch.zeros(8)})
    case("sigmoid_gate: a site", partial(NET.gated, one, half, X), ValueError, r"2\.weight has no vectors.*\[6\]")
    wrong = R.sigmoid_gate({n: v[0, :5] for n, v in gate.items()})
    case("sigmoid_gate: a size", partial(NET.gated, one, wrong, X), ValueError, r"0\.weight: the vectors are \[5\]")
    for n, route in (
        ("phatgoose, k", partial(R.phatgoose, gate, k=0)),
        ("arrow, k", partial(R.arrow, NET, MANY, k=0)),
        ("arrow, temperature", partial(R.arrow, NET, MANY, temperature=0.0)),
        ("arrow, steps", partial(R.arrow, NET, MANY, steps=0)),
        ("top_k, k", partial(R.top_k, X, k=9)),
    ):
        case(f"out of range: {n}", route, ValueError, r"k(=| is )\d.*give")
    case("without_general: a site", partial(R.without_general, MANY, FEW), ValueError, r"2\.weight.*two stacks of one")
    case(
        "without_general: more", partial(R.without_general, FEW, MANY), ValueError, r"2\.weight has nothing in the exp"
    )
    three = pf.stack([wide(3).init()])
    case("without_general: a rank", partial(R.without_general, MANY, three), ValueError, r"0\.weight has .*\[3, 8\]")
    case("xlora: no states", partial(R.xlora, NET, nn.Linear(4, 3)), ValueError, "takes no output_hidden_states")
    case("xlora: k", partial(R.xlora, NET, nn.Linear(4, 3), k=0), ValueError, "k=0.*k >= 1")
    case("Routed: none", lambda: pf.Routed(NET, 0, lambda *a: X, lambda s: {}), ValueError, "experts is 0; give at")

    for n, rate in (
        ("sgd", T.sgd),
        ("adamw", T.adamw),
        ("lora_muon", partial(T.lora_muon, NET)),
        ("lora_rite", partial(T.lora_rite, NET)),
        ("loft", partial(T.loft, NET)),
    ):
        for lr in (-1.0, float("nan")):
            case(f"{n}: rate {lr}", partial(rate, lr), ValueError, rf"{n}: lr is {lr}; give a finite lr >= 0")
    case(
        "adamw: betas", partial(T.adamw, 0.1, betas=(0.9, 1.0)), ValueError, r"adamw: .*\(0\.9, 1\.0\); give numbers in"
    )
    adamw = T.adamw(0.1)
    mixed = partial(adamw.update, HALF.init(), adamw.init(NET.init()), NET.init())
    case("adamw: another net's gradients", mixed, KeyError, r"2\.weight is missing")
    leaf = {n: {"a": t["a"]} for n, t in NET.init().items()}
    case(
        "adamw: a tensor", partial(adamw.update, leaf, adamw.init(NET.init()), NET.init()), KeyError, r"0\.weight: b is"
    )
    fa = partial(pf.optim.lora_fa, NET, NET.init(), HALF.init())
    case("optim.lora_fa: another net's", fa, KeyError, r"2\.weight is missing")
    none = partial(pf.optim.LoRAFA, IA3.init(), net=IA3)
    case("optim.LoRAFA: no pairs", none, ValueError, "has no LoRA")

    for r in (0, 9):
        case(
            f"to_lora: rank {r}", partial(pf.to_lora, NET, NET.init(), rank=r), ValueError, r"0\.weight: rank is .*<= 6"
        )
    case("extract: rank", partial(pf.extract, BASE, FOREIGN.merge(random(FOREIGN)), rank=0), ValueError, "rank is 0")
    case("loftq: a quantiser", partial(S.loftq, NET, lambda w: w[0]), ValueError, r"0\.weight: quantise returns \[8\]")
    case("corda: zeros", partial(S.corda, NET, [0 * X]), ValueError, r"0\.weight: its inputs in a batch are all zero")
    case("eva: too few", partial(S.eva, NET, [X[:1]]), ValueError, "1 tokens are too few for 4 components; give more")
    for n in ("lora_ga", "lora_one"):
        start = partial(getattr(S, n), wide(1), [X], loss=lambda out, batch: 0 * out.sum())
        case(f"{n}: zero", start, ValueError, r"0\.weight: the gradient is zero in all 1 batches")
    return out


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    call, kind, match = CASES[name]
    before = state(BASE), state(OTHER)
    with pytest.raises(kind, match=match):
        call()
    assert same_state(state(BASE), before[0]) and same_state(state(OTHER), before[1])


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_was_read_is_empty(name: str) -> None:
    """A data loader's iterator, given twice: the second time there is nothing, and that is said."""
    batches = iter([X, X + 1])
    STREAMS[name](batches)
    with pytest.raises(ValueError, match="a generator runs only once"):
        STREAMS[name](batches)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_once_and_its_batches_are_not_kept(name: str) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for i in range(6):
            x = X + i
            alive.append(weakref.ref(x))
            yield x
            del x
            most = max(most, sum(r() is not None for r in alive))

    STREAMS[name](stream())
    assert len(alive) == 6 and most <= 2  # the last one and, at most, its successor
