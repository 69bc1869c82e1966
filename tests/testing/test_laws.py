"""Every law for every registered method: a new method is covered by being registered."""

from dataclasses import dataclass
from functools import cache

import pytest
from support import ALONG, AROUND, CHAINS, FIRST, INPUTS, METHODS, OURS
from torch import Tensor

import peftfn as pf
from peftfn.core.method import Method, Weight, registry
from peftfn.testing import CORE, LAWS, ONCE, LawBroken, check_law, check_method, models_for

kinds = cache(models_for)
AROUND_BOTH = pf.chain(pf.Bottleneck(2), pf.Bottleneck(2, of="input"))
AROUND_NOISE = pf.chain(pf.NEFTune(), pf.Bottleneck(2), pf.LoReFT(2, last=1))


@pytest.mark.parametrize("law", [law for law in LAWS if law not in CORE | ONCE or law == "values"])
@pytest.mark.parametrize("method", METHODS + CHAINS + AROUND + [AROUND_BOTH, AROUND_NOISE] + ALONG + INPUTS, ids=str)
def test_law(method: Method, law: str) -> None:
    check_law(law, method, models=kinds(method))


@pytest.mark.parametrize("law", [law for law in LAWS if law in CORE | ONCE and law != "values"])
@pytest.mark.parametrize("method", [*FIRST, *{type(m): m for m in AROUND}.values(), *ALONG[:1], *INPUTS[-1:]], ids=str)
def test_law_of_the_core(method: Method, law: str) -> None:
    check_law(law, method, models=kinds(method))


def test_every_method_has_cases() -> None:
    assert {pf.LoRA, pf.Bottleneck, pf.PromptTuning} <= {type(m) for m in OURS}, "the methods are not imported"
    assert {type(m).__name__ for m in OURS} >= {
        n for n, c in registry.items() if c.__module__.startswith("peftfn.methods")
    }


class TestTheLawsFindFaults:
    """Laws that cannot fail are worth nothing: each broken method must be caught by the law it breaks."""

    @pytest.mark.parametrize(
        ("law", "text", "broken"),
        [
            ("identity", "differs", {"init": lambda self, rng, w: {"a": rng.ones(*w.shape)}}),
            ("meaning_is_speed", "linear: differs", {"linear": lambda self, p, w, x: x @ (w + 2 * p["a"]).mT}),
            ("routes", "apply: differs", {"product": lambda self, p, w, x, dot: dot(x, w - p["a"])}),
            ("routes", "gradient of apply", {"product": lambda self, p, w, x, dot: dot(x, w + half_detached(p["a"]))}),
            ("gradients", "does not require grad", {"delta": lambda self, p, w: p["a"].detach()}),
            ("functions", "int64", {"init": lambda self, rng, w: {"a": rng.zeros(*w.shape).long()}}),
            ("effect", "change nothing", {"delta": lambda self, p, w: 0 * p["a"]}),
        ],
    )
    def test_broken(self, law: str, text: str, broken: dict[str, object]) -> None:
        with pytest.raises(LawBroken, match=rf"(?s)^{law}: .*{text}"):
            check_method(type("Broken", (Dense,), broken)(), laws=[law])

    def test_sites_that_share_a_bank(self) -> None:
        """With one site a bank of one row is right whatever the row: only several sites tell."""
        check_law("routes", pf.TinyLoRA(rank=2, size=3))
        with pytest.raises(LawBroken, match=r"routes: Case\(.*'linear, several'"):
            check_law("routes", FirstRow(rank=2, size=3))


def half_detached(a: Tensor) -> Tensor:
    """a, with half its gradient."""
    return 0.5 * a + 0.5 * a.detach()


@dataclass(frozen=True)
class FirstRow(pf.TinyLoRA):
    """TinyLoRA whose row of the bank is picked in a way that vmap does not follow: it then gives all rows."""

    def prepare(self, p, w):  # type: ignore[no-untyped-def]
        r = (p["v"].index_select(0, p["group"]) @ p["P"].flatten(1)).view(p["P"].shape[1:])
        return {"down": p["A"], "up": p["B"] @ r} if "A" in p else {"down": p["B_rows"].mT, "up": (r @ p["A_rows"]).mT}


class Dense(Weight):
    """W + A."""

    def init(self, rng, w):  # type: ignore[no-untyped-def]
        return {"a": rng.zeros(*w.shape)}

    def delta(self, p, w):  # type: ignore[no-untyped-def]
        return p["a"]


def test_the_unbroken_one_passes() -> None:
    check_method(Dense(), laws=[law for law in LAWS if law != "values"])


def test_what_check_method_is_given() -> None:
    with pytest.raises(ValueError, match="no law 'identty'; choose from values, "):
        check_method(Dense(), ["identty"])
    with pytest.raises(TypeError, match=r"like LoRA\(rank=2\), not <class"):
        check_method(Dense)  # type: ignore[arg-type]
