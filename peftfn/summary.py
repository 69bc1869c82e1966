"""What a net trains, in PEFT's one line and in a table by site."""

from collections import Counter
from math import prod

from torch import Tensor

from peftfn.apply import Adapted


def counts(net: Adapted) -> tuple[int, int]:
    """(trainable parameters of one adapter, parameters of base and adapter together); tied tensors count once."""
    trained = sum(prod(shape) for e in net.plan.values() for shape in e.spec.values())
    trained += sum(prod(shape) for bank in net.plan.banks.values() for shape in bank.values())
    unique: dict[int, Tensor] = {id(p): p for p in net.model.parameters()}
    return trained, trained + sum(p.numel() for p in unique.values())


def summary(net: Adapted, *, by_site: bool = True) -> str:
    """ "trainable params: X || all params: Y || trainable%: Z", and a line for each site."""
    trained, total = counts(net)
    head = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    if not by_site:
        return head
    rows = [("site", "kind", "shape", "method", "trainable")]
    for name, e in net.plan.items():
        n = sum(prod(shape) for shape in e.spec.values())
        rows.append((name, e.site.kind, "×".join(map(str, e.site.shape)), str(e.method), f"{n:,}"))
    for name, bank in net.plan.banks.items():
        sites = Counter(e.bank for e in net.plan.values())[name]
        rows.append((name, "bank", f"of {sites} sites", "", f"{sum(map(prod, bank.values())):,}"))
    width = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])
