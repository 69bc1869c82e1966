"""What a net trains: PEFT's line, and a table by site."""

from collections import Counter
from math import prod

from torch import nn

from peftfn.model.model import Model
from peftfn.net.net import Adapted
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tools.table import table


def counts(net: Adapted) -> tuple[int, int]:
    """(trainable parameters of one adapter, parameters of base and adapter together).

    Tied tensors count once, and quantised weights as the matrices they stand for.
    """
    trained = sum(prod(shape) for e in net.plan.values() for shape in e.spec.values())
    trained += sum(prod(shape) for bank in net.plan.banks.values() for shape in bank.values())
    known = Model.of(net.model)
    hidden = {id(w): w for w in known.weights.held.values() if isinstance(w, QuantisedWeight)}
    packed = {id(w.layer._parameters.get("weight")) for w in hidden.values()}
    plain = {id(p): p for p in known.parameters.values() if id(p) not in packed}
    base = sum(p.numel() for p in plain.values()) + sum(w.numel() for w in hidden.values())
    return trained, trained + base


def summary(net: Adapted, *, by_site: bool = True) -> str:
    """Return what one adapter of the net trains, as text: PEFT's line, then a table of the sites.

        trainable params: 256 || all params: 22,944 || trainable%: 1.1158
        site                                    kind    shape  method        trainable
        model.layers.0.self_attn.q_proj.weight  linear  32×32  LoRA(rank=4)  256

    Of a method's fields it shows the first, and those that differ from their default. "all params" counts the base and
    the adapter; tied tensors count once.

    Args:
        net: what `adapt` returned.
        by_site: if False, the first line only.

    Returns:
        The text, to print.

    Raises:
        TypeError: `net` is a module; for one that `as_module` made, call `status`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        assert pf.summary(net, by_site=False).startswith("trainable params: 24 ")
    """
    if not isinstance(net, Adapted):
        cure = "; for a module that as_module made, print(peftfn.status(m))" if isinstance(net, nn.Module) else ""
        raise TypeError(f"summary: give a net, which peftfn.adapt returns, not {type(net).__name__}{cure}")
    trained, total = counts(net)
    head = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    if not by_site:
        return head
    rows = [("site", "kind", "shape", "method", "trainable")]
    for e in net.plan.values():
        n = sum(prod(shape) for shape in e.spec.values())
        rows.append((e.site.label, e.site.kind, "×".join(map(str, e.site.shape)), str(e.method), f"{n:,}"))
    for name, bank in net.plan.banks.items():
        sites = Counter(e.bank for e in net.plan.values())[name]
        rows.append((name, "bank", f"of {sites} sites", "", f"{sum(map(prod, bank.values())):,}"))
    return f"{head}\n{table(rows)}"
