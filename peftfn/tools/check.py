"""check: what often goes wrong in training an adapter, looked for in a net, an adapter, and a loss."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from peftfn.core import functions
from peftfn.core.combine import is_expression
from peftfn.core.method import Weight
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.model.choice import HEADS
from peftfn.net.net import Adapted
from peftfn.tensors.tree import leaves

_HEADS = sorted({name for names in HEADS.values() for name in names})


@dataclass(frozen=True)
class Finding:
    """One thing that `check` found.

    Args:
        kind: one word for what it is; `docs/troubleshooting.md` has a line for each.
        where: the site or module, or "" for the whole.
        what: what is so.
        cure: what to write.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        net = pf.adapt(model, {"weight": pf.LoRA(rank=2)})
        (finding,) = pf.check(net, net.init())
        assert isinstance(finding, pf.Finding) and finding.kind == "identity"
    """

    kind: str
    where: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where + ': ' if self.where else ''}{self.what}. {self.cure}"


def check(
    net: Adapted, adapter: Mapping[str, Any] | None = None, loss: Callable[[Any], Tensor] | None = None
) -> tuple[Finding, ...]:
    """Look for what often goes wrong: fresh heads and tokens, sites that do not train, NaN, dtypes, modes.

    Nothing is changed. Not all that it finds is an error: a fresh adapter is the identity, as it should be. `verify`
    measures what an adapter does on a batch.

    Args:
        net: what `adapt` or `load` returned.
        adapter: what to look at; None looks at the net and its model alone.
        loss: adapter ↦ a loss, of one batch; its gradient is computed once, to find what does not train.

    Returns:
        The findings, as data; `print(*pf.check(net, a), sep="\\n")` shows them.

    Raises:
        KeyError, ValueError: the adapter does not fit the net.
        TypeError: `net` is none, or `loss` is given without an adapter.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"weight": pf.LoRA(rank=2)})
        a, x = net.init(), torch.randn(3, 8)
        found = pf.check(net, a, lambda a: net.apply(a, x).square().sum())
        assert [f.kind for f in found] == ["identity"]  # fresh: nothing else is wrong
    """
    if not isinstance(net, Adapted):
        raise TypeError(f"check: give a net, which peftfn.adapt returns, not {type(net).__name__}")
    if loss is not None and adapter is None:
        raise TypeError("check: loss is a function of the adapter: give the adapter too")
    found = [*_heads(net), *_vocabulary(net), *_statistics(net), *_ties(net), *_mode(net)]
    if adapter is not None:
        net.plan.check(adapter)
        found += [*_values(net, adapter), *_identity(net, adapter)]
        if loss is not None:
            found += _gradient(net, adapter, loss)
    return tuple(found)


# Of the model and the plan.


def _heads(net: Adapted) -> Iterator[Finding]:
    for name, module in net.model.named_modules():
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if name.rpartition(".")[2] in _HEADS and own and not any(n in net.plan for n in own):
            yield Finding(
                "head",
                name,
                "no rule trains this head. Where it is fresh (transformers tells so on loading the model), it stays "
                "random, in files too",
                f'Add a rule {{"{name}": peftfn.Full()}}, or use peftfn.targets(model, method, task="SEQ_CLS")',
            )


def _vocabulary(net: Adapted) -> Iterator[Finding]:
    inner = getattr(net.model, "get_input_embeddings", lambda: None)()
    if not isinstance(inner, nn.Module) or not isinstance(w := getattr(inner, "weight", None), Tensor):
        return
    name = next(n for n, m in net.model.named_modules() if m is inner)
    old = _vocabulary_of_base(getattr(net.model, "config", None))
    if old is not None and w.shape[0] > old and f"{name}.weight" not in net.plan:
        yield Finding(
            "vocabulary",
            name,
            f"it has {w.shape[0]} rows and the base's own configuration {old}: no rule trains the new ones, so they "
            "stay as they were drawn, in files too",
            f"Train them: peftfn.TiedTokens or peftfn.TrainableTokens(tokens=tuple(range({old}, {w.shape[0]})))",
        )


def _vocabulary_of_base(config: Any) -> int | None:
    """vocab_size in the folder that the model was loaded from, where it is one."""
    file = Path(str(getattr(config, "_name_or_path", "") or "")) / "config.json"
    if config is None or not file.is_file():
        return None
    size = json.loads(file.read_text()).get("vocab_size")
    return size if isinstance(size, int) else None


def _statistics(net: Adapted) -> Iterator[Finding]:
    whole = {e.site.module for e in net.plan.values() if isinstance(e.method, Full)}
    for name, module in net.model.named_modules():
        if module.training and module._buffers.get("running_mean") is not None and name not in whole:
            yield Finding(
                "statistics",
                name,
                "in train mode, a module view moves its running statistics, and no file has those of a layer that no "
                "Full trains",
                f'Put it into eval mode, add a rule {{"{name}": peftfn.Full()}}, or save peftfn.buffers_of(m)',
            )


def _ties(net: Adapted) -> Iterator[Finding]:
    seen: set[str] = set()
    for name, entry in net.plan.items():
        seen.add(name)
        for other in entry.site.tied:
            there = net.plan.get(other)
            as_one = there is not None and isinstance(entry.method, TiedTokens) and there.bank == entry.bank
            if as_one or other in seen:
                continue
            how = "which no rule adapts" if there is None else "and each has a leaf of its own"
            yield Finding(
                "tied",
                name,
                f"it shares its tensor with {other}, {how}: the two differ once an adapter changes them, and merging "
                "raises",
                "Leave it out, adapt both as one (peftfn.TiedTokens), or merge with untied=True",
            )
            break


def _mode(net: Adapted) -> Iterator[Finding]:
    dropping = [n for n, e in net.plan.items() if e.method.eval() != e.method]
    if dropping and not net.model.training:
        yield Finding(
            "mode",
            dropping[0],
            f"{net.plan[dropping[0]].method} has dropout or other randomness, which is off: the model is in eval mode",
            "For training, call model.train()",
        )


# Of an adapter.


def _values(net: Adapted, adapter: Mapping[str, Any]) -> Iterator[Finding]:
    for name, leaf in adapter.items():
        ts = leaves(leaf)
        if any(not bool(torch.isfinite(t).all()) for t in ts):
            yield Finding(
                "nan",
                name,
                "the adapter has values that are no finite numbers",
                "Go back to an earlier adapter; lower the learning rate, clip gradients, keep leaves in fp32",
            )
        half = next((t.dtype for t in ts if t.dtype in (torch.float16, torch.bfloat16)), None)
        if half is not None:
            yield Finding(
                "dtype",
                name,
                f"its tensors are {half}: small steps of an optimizer are rounded away",
                "Train fp32 leaves, net.init(dtype=torch.float32), also on a half-precision base; convert to save",
            )
    for name, w in net.weights.items():
        if name in net.plan and isinstance(w, Tensor) and w.is_floating_point() and not bool(torch.isfinite(w).all()):
            yield Finding("nan", name, "the base's own weight has values that are no finite numbers", "Load it again")


def _identity(net: Adapted, adapter: Mapping[str, Any]) -> Iterator[Finding]:
    """Sites where the adapter changes nothing; one finding where that is so everywhere."""
    plain = {n: e for n, e in net.plan.meant.items() if e.family is Weight and e.method.mergeable}
    weights, still = net.weights, []
    with torch.no_grad():
        for name, entry in plain.items():
            method, p, w = functions.tensors(entry, weights, adapter)
            change = entry.delta(method, p, entry.site.canonical(w))
            b = entry.new_bias(method, p, bias := functions.bias_at(entry.site, weights), w.dtype)
            same = b is bias or (b is not None and torch.equal(b, torch.zeros_like(b) if bias is None else bias))
            if same and not bool(change.any()):
                still.append(name)
    if still and len(still) == len(net.plan):
        yield Finding(
            "identity",
            "",
            f"the adapter changes none of its {len(still)} sites, as a fresh one does",
            "After training: see that the optimizer has these very tensors, and that what it returns is what you pass",
        )
    elif len(still) < len(plain):
        for name in still:
            if not is_expression(adapter[name]):
                yield Finding(
                    "dead",
                    name,
                    "the adapter changes nothing here, while it changes other sites",
                    "See whether the model's forward uses this layer; leave it out of the rules otherwise",
                )


def _acting(net: Adapted) -> str:
    return str(net.plan[net.plan.gated[0]].method)


def _gradient(net: Adapted, adapter: Mapping[str, Any], loss: Callable[[Any], Tensor]) -> Iterator[Finding]:
    g = grad(loss)(adapter)
    zero = [n for n, leaf in g.items() if leaves(leaf) and not any(bool(t.any()) for t in leaves(leaf))]
    for name, leaf in g.items():
        if any(not bool(torch.isfinite(t).all()) for t in leaves(leaf)):
            yield Finding(
                "nan",
                name,
                "its gradient has values that are no finite numbers",
                "Look at the loss on this batch (labels that are all ignored give 0/0), and at the base's dtype",
            )
    if zero and len(zero) == len(g):
        yield Finding(
            "untrained",
            "",
            "the gradient is zero at every site",
            "See that the loss depends on net.apply(adapter, …), and not on the model without it or under no_grad"
            + (f"; and that rows of the batch have the tokens on which {_acting(net)} acts" if net.plan.gated else ""),
        )
        return
    for name in zero:
        yield Finding(
            "untrained",
            name,
            "its gradient is zero on this batch",
            "See whether the forward uses this layer on this batch (experts, unused heads); leave it out otherwise",
        )
