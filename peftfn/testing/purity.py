"""The law that a call leaves the base as it was, and how two states of a model are compared."""

from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.testing.case import Case, close, shaken


def purity(c: Case) -> None:
    """After any call, also one that raises, the base is what it was: its tensors bit for bit, and each module's
    children, hooks, mode and attributes. And calls repeat, whatever the forward writes.
    """
    a = c.adapter()
    kept = {n: {k: t.clone() for k, t in leaf.items()} for n, leaf in a.items()}
    before = held(c.model)
    first = c.net.apply(a, c.x)
    c.loss({n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in c.adapter().items()}).backward()  # type: ignore[no-untyped-call]
    try:
        c.net.apply(a, object())
    except (TypeError, AttributeError, ValueError):
        pass
    else:
        raise AssertionError("an object() went through the model")
    assert torch.equal(c.net.apply(a, c.x), first), "the same call gave another result"
    unchanged(held(c.model), before)
    close(a, kept, "the adapter's own tensors, after a call", 0)
    _writing_forward(c)


class _Writing(nn.Module):
    """A model whose forward does what forwards do when they are first called: it installs a hook, which adds 1, says
    so, counts, and keeps what it has made."""

    def __init__(self, inner: nn.Module, writes: bool):
        super().__init__()
        self.inner, self.writes, self.ready, self.seen = inner, writes, False, [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.writes and not self.ready:
            self.inner.register_forward_hook(lambda module, inputs, y: y + 1)
            self.register_buffer("made", torch.zeros(()))
            self.ready = True
        self.seen.append(1)
        out: Tensor = self.inner(x) + len(self.seen)
        return out


def _writing_forward(c: Case) -> None:
    model = _Writing(c.model, True).eval()
    plain = pf.adapt(_Writing(c.model, False).eval(), {c.site: c.method}, seed=c.seed)
    a = shaken(plain.init(c.seed, dtype=torch.promote_types(c.dtype, torch.float32)), c.seed)
    net, before = pf.adapt(model, {c.site: c.method}, seed=c.seed), held(model)
    for _ in range(3):
        close(net.apply(a, c.x), plain.apply(a, c.x) + 1, "a model whose forward installs a hook")
    unchanged(held(model), before)


def held(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave alone, by place: of each module the tensors, children, hooks, mode and attributes,
    each by identity and by value.
    """
    out: dict[str, Any] = {}

    def look(v: Any, where: str, above: tuple[int, ...]) -> None:
        if isinstance(v, Tensor):
            out[where] = (id(v), v._version, v.detach().clone(), v.grad is None)
            return
        out[where] = (id(v),) if not isinstance(v, bool | int | float | str) else (v,)
        if id(v) in above or isinstance(v, nn.Module | type):
            return
        inside = v if isinstance(v, dict) else vars(v) if hasattr(v, "__dict__") and not callable(v) else {}
        inside = dict(enumerate(v)) if isinstance(v, list | tuple | set) else inside
        for k, part in inside.items():
            look(part, f"{where}/{k}", (*above, id(v)))

    for name, module in model.named_modules(remove_duplicate=False):
        look(dict(vars(module)), name, ())
        out[name] = (id(module),)
    return out


def unchanged(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Both as `held` tells them; AssertionError with what came, went or changed."""
    odd = sorted(now.keys() ^ before.keys())
    assert not odd, f"the call left this in the base, or took it away: {', '.join(odd[:5])}"
    for where, was in before.items():
        is_ = now[where]
        same = all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(is_, was, strict=True)
        )
        assert same, f"{where} changed"
