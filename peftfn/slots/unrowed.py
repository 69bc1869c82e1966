"""What of a mixed batch has no rows: the model's own tables, and what adapted layers make of them.

DeBERTa's relative positions, say, are a parameter that goes through a norm and then through the projections that the
batch goes through. What such a layer gives is another table for each row, in a shape without rows: `each` holds all of
them, functions of tables alone run on each, and where a table meets rows each row meets its own.
"""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from peftfn.slots.gates import Gates
from peftfn.slots.slot import Slot
from peftfn.slots.tags import Lost, RowsLost, constant
from peftfn.slots.track import Tracking, current
from peftfn.tensors.arguments import batched, mapped, memory, tensors, visit
from peftfn.tensors.lent import Lent, writes

_MEET = frozenset(
    [
        *(getattr(torch, k) for k in ("add", "sub", "mul", "div", "true_divide", "where", "matmul")),
        *(getattr(Tensor, k) for k in ("add", "sub", "mul", "div", "true_divide", "where", "matmul")),
        *(getattr(Tensor, k) for k in ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__")),
        *(getattr(Tensor, f"__{r}{k}__") for k in ("add", "sub", "mul", "truediv", "matmul") for r in ("", "r")),
    ]
)
"""Functions that broadcast from the last dimension on, in which a table may meet rows."""
_OVER_MATRICES = frozenset(
    [
        *(F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention, torch.matmul, Tensor.matmul),
        *(Tensor.__matmul__, Tensor.__rmatmul__),
    ]
)
"""Functions whose inputs' last two dimensions do not lie side by side: it is those before that they have in common."""
_BATCHED = _MEET | _OVER_MATRICES
"""Functions whose inputs, where they have as many dimensions, have the same first one."""
_OF_IT = frozenset(getattr(Tensor, k).__get__ for k in ("_base", "grad"))
"""What gives another tensor that belongs to it, and is no value made of it."""
_READS = frozenset(
    [
        *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "equal"),
        *("allclose", "is_nonzero", "__contains__"),
    ]
)
"""What makes numbers of it, which are one for all rows."""
_NEW = frozenset(["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"])
"""Functions that take nothing but dtype and device from their tensor."""


class Unrowed(Tensor):
    """A tensor in which no row of the batch has a part.

    each: [rows, …] the value of every row, where an adapted layer made it; None: all rows have the same. It is known to
    be so as long as nobody writes to it: `version` tells.
    """

    each: Tensor | None
    rows: Gates
    site: str
    version: int | None

    @classmethod
    def of(cls, t: Tensor, rows: Gates, each: Tensor | None = None, site: str = "") -> "Unrowed":
        out = t.as_subclass(cls)
        out.each, out.rows, out.site = each, rows, site
        with torch._C.DisableTorchFunctionSubclass():
            out.version = None if out.is_inference() else out._version
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Slot) for t in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return _called(func, args, kwargs or {})


def known(t: Tensor) -> bool:
    """Whether t is certain to have no rows in it."""
    if not isinstance(t, Unrowed):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return t.version is None or t.version == t._version


def owned(t: Tensor, rows: Gates) -> bool:
    """Whether t is certain to be the same for all rows."""
    return rows.owned(t) or (isinstance(t, Unrowed) and t.each is None and known(t))


def plain(t: Tensor) -> Tensor:
    """t as an ordinary tensor."""
    return t.as_subclass(Tensor) if isinstance(t, Unrowed) else t


def on_each(x: Tensor, rows: Gates, site: str, run: Callable[[Tensor], Tensor]) -> Unrowed:
    """`run`, which takes and gives rows, on an input that has none: each row has its own output."""
    each = x.each if isinstance(x, Unrowed) else None
    y = run(plain(x).expand(rows.size or 1, *x.shape) if each is None else each)
    return Unrowed.of(y[0], rows, y, site)


def check_output(out: Any) -> None:
    """ValueError for an output that is another table for each row, in a shape without rows."""
    for t in tensors(out):
        if isinstance(t, Unrowed) and t.each is not None:
            raise ValueError(
                f"{t.site}: the model returns what this site gives for an input that all rows have in common, "
                f"{list(t.shape)}, which is another for each row. Call net.apply for one adapter at a time, or leave "
                "this site out of the rules."
            )


def tables(module: nn.Module) -> list[str]:
    """The parameters of a module that a model may use as a table: embeddings, and those that its own modules hold."""
    own = not type(module).__module__.startswith("torch.nn")
    if not own and not isinstance(module, nn.Embedding):
        return []
    return [k for k, p in module._parameters.items() if p is not None and p.dim() > 1 and (k != "weight" or not own)]


def mark(slots: Iterable[tuple[MutableMapping[str, Any], str]], rows: Gates) -> None:
    """Let the tables in these slots be known."""
    for held, k in slots:
        if type(held[k]) in (Tensor, Lent):
            held[k] = Unrowed.of(held[k], rows)


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    tables: list[Unrowed] = []
    others: list[Tensor] = []

    def sort(v: Any) -> None:
        if isinstance(v, Unrowed) and known(v):
            tables.append(v)
        elif isinstance(v, Unrowed) and v.each is not None:
            raise _written(v, getattr(func, "__name__", ""))
        elif isinstance(v, Tensor) and v.dim():
            others.append(v)

    visit((args, kwargs), sort)
    if not tables:
        return func(*args, **kwargs)
    rows, t = tables[0].rows, _following(tables[0].rows)
    rowed = [v for v in others if not rows.owned(v) and (t is None or t.get(v) is not None)]
    name = getattr(func, "__name__", "")
    if all(t.each is None for t in tables):
        out = func(*args, **kwargs)
        if rowed and tables[0].version is None and tables[0] is args[0] and writes(name):
            raise ValueError(
                f"the model's forward writes rows of the batch into a table of its own ({name}), and inference_mode "
                "does not count writes: use torch.no_grad for this model"
            )
        return out if rowed or name in _NEW or name.endswith("_like") else _wrapped(out, rows, None, "")
    site = next(t.site for t in tables if t.each is not None)
    if rowed:
        return _met(func, args, kwargs, rows, rowed, site)
    own = next(t for t in tables if t.each is not None)
    if writes(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
        if not args or own is not args[0] or kwargs.get("out") is not None:
            raise _untold(site, f"the model writes it into another tensor ({name})")
        return _in_place(own, func, args, kwargs)
    out = func(*args, **kwargs)
    if not all(known(t) for t in tables):
        raise _written(own, name)
    if name in _READS and any(bool((t.each != t.each[:1]).any()) for t in tables if t.each is not None):
        raise _untold(site, f"the model reads its values ({name})")
    found: list[Tensor] = []
    visit(out, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    if not found or func in _OF_IT:
        return out
    if name == "repeat" and (made := _repeated(tables[0], args[1:], rows)) is not None:
        return made
    each = [t.each for t in tables if t.each is not None]

    def one(*values: Tensor) -> Any:
        left = iter(values)

        def swap(v: Any) -> Any:
            return next(left) if isinstance(v, Unrowed) and v.each is not None and known(v) else v

        return func(*mapped(args, swap), **mapped(kwargs, swap))

    return _wrapped(out, rows, vmap(one, randomness="different")(*each), site)


def _in_place(own: Unrowed, func: Any, args: Any, kwargs: Any) -> Any:
    """A function that writes to a table: it writes to every row's own. What else looks at that memory is out of date,
    which its version tells."""
    each = own.each
    assert each is not None
    if own.version is None or any(isinstance(v, Unrowed) and v.each is not None for v in tensors((args[1:], kwargs))):
        raise _written(own, getattr(func, "__name__", ""))  # inference_mode does not count writes
    shared = memory(own) == memory(each)
    try:
        vmap(lambda e: func(e, *args[1:], **kwargs), randomness="different")(each)
        out = own if shared else func(*args, **kwargs)
    except RuntimeError as e:
        raise _written(own, getattr(func, "__name__", "")) from e
    own.version = own._version
    return own if out is own or func is Tensor.__setitem__ else out


def _written(table: Unrowed, name: str) -> ValueError:
    return ValueError(
        f"{table.site}: all rows have its input in common, so its output {list(table.shape)} is another for each row, "
        f"and the model writes to it in place ({name}), which would change that of one row alone. Call net.apply for "
        "one adapter at a time, or leave this site out of the rules."
    )


def _wrapped(out: Any, rows: Gates, each: Any, site: str) -> Any:
    if isinstance(out, list | tuple):
        return type(out)(
            _wrapped(o, rows, None if each is None else e, site)
            for o, e in zip(out, out if each is None else each, strict=True)
        )
    new = isinstance(out, Tensor) and (each is not None or not isinstance(out, Unrowed))
    return Unrowed.of(plain(out), rows, each, site) if new else out


def _repeated(table: Unrowed, sizes: Any, rows: Gates) -> Tensor | None:
    """The rows' own tables one after the other, where the model repeats the one it sees for every row."""
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    n, each = sizes[0], table.each
    if each is None or rows.size is None or n == 1 or rows.at(n) is None or len(sizes) != table.dim():
        return None
    each = each.repeat_interleave(n // rows.size, 0)
    return each.repeat(1, 1, *sizes[1:]).flatten(0, 1)


def _following(rows: Gates) -> Tracking | None:
    """What follows the rows of this call now. It knows all that has rows: a tensor without a tag has none."""
    t = current()
    return t if t is not None and t.call is rows.call and rows.call is not None else None


def _owners(rows: Gates, rowed: list[Tensor], dims: int, count: int) -> Tensor | None:
    """The row of each entry of the first dimension, where a table meets `count` of them; None if it is not known."""
    t = _following(rows)
    if t is None:
        known = bool(rows.size) and rows.at(count) is not None
        return torch.arange(count) // (count // (rows.size or 1)) if known else None
    tags = [t.get(v) for v in rowed if v.dim() == dims and v.shape[0] == count]
    tag = next((g for g in tags if isinstance(g, Tensor)), None)
    one = None if tag is None or t.call.gates.tokens is not None else constant(tag, range(1, dims))
    if one is None or bool((one < 0).any()):
        return None
    return one.flatten().expand(count)


def _untold(site: str, what: str) -> RowsLost:
    return RowsLost(
        f"{site}: all rows have its input in common, so its output is another for each row, and {what}, where peftfn "
        "cannot tell the rows. Call net.apply for one adapter at a time, or leave this site out of the rules."
    )


def _apart(t: Tracking, func: Any, args: Any, kwargs: Any, rows: Gates, site: str) -> Any:
    """A function in which tables meet rows that are followed: it runs with the tables of every row, and each position
    of the output is that of its own row, which its tag tells."""
    name = getattr(func, "__name__", str(func))
    if writes(name) or "out" in kwargs or t.call.gates.tokens is not None:
        raise _untold(site, f"{name} writes to what has rows")
    tables: list[Unrowed] = []
    visit((args, kwargs), lambda v: tables.append(v) if isinstance(v, Unrowed) and v.each is not None else None)
    tag = t.of_output(func, args, kwargs, out := func(*args, **kwargs))
    if not isinstance(out, Tensor) or isinstance(tag, list):
        raise _untold(site, f"{name} uses it, and gives several tensors")
    if isinstance(tag, Lost):
        raise _untold(site, tag.why)

    def of_row(i: int) -> Tensor:
        own = {id(v): v.each[i] for v in tables if v.each is not None}
        y: Tensor = func(*mapped(args, lambda v: own.get(id(v), v)), **mapped(kwargs, lambda v: own.get(id(v), v)))
        return y

    if tag is None:
        return Unrowed.of(plain(out), rows, torch.stack([of_row(i) for i in range(rows.size or 0)]), site)
    if batched(tag) or bool((tag < 0).any()):
        raise _untold(site, f"{name} uses it with positions of no row")
    if not tag.numel():
        return t.put(plain(out), tag)
    first, *others = tag.unique().tolist()
    y = of_row(first)
    for i in others:
        y = torch.where(tag == i, of_row(i), y)
    return t.put(y, tag)


def _met(func: Any, args: Any, kwargs: Any, rows: Gates, rowed: list[Tensor], site: str) -> Any:
    """A function in which tables meet rows: each row meets its own."""
    dims = max(v.dim() for v in rowed)
    count = max((v.shape[0] for v in rowed if v.dim() == dims), default=0)
    owner, t = _owners(rows, rowed, dims, count), _following(rows)

    def own(v: Tensor, each: Tensor) -> Tensor | None:
        """v, each row with its own; None where that cannot be told of shapes alone."""
        shape = list(v.shape)
        if owner is None or not rows.size or (func in _OVER_MATRICES and (dims < 3 or v.dim() < 2)):
            return None
        if func in _BATCHED and v.dim() == dims and shape[0] == count > 1:
            return each[owner.to(each.device), torch.arange(count, device=each.device)]  # the model has expanded it
        if v.dim() == dims and shape[0] == 1:
            shape = shape[1:]
        if func not in _MEET or len(shape) >= dims or (func in _OVER_MATRICES and len(shape) < 2):
            return None
        return each[owner.to(each.device)].reshape(count, *[1] * (dims - 1 - len(shape)), *shape)

    given: list[Unrowed] = []
    visit((args, kwargs), lambda v: given.append(v) if isinstance(v, Unrowed) and v.each is not None else None)
    owns = {id(v): own(v, v.each) for v in given if v.each is not None and known(v)}
    name = getattr(func, "__name__", str(func))
    if any(o is None for o in owns.values()):
        if t is None:
            raise _untold(site, f"{name} uses it with {[list(r.shape) for r in rowed]}")
        return _apart(t, func, args, kwargs, rows, site)
    if id(args[0]) in owns and writes(name):  # what is returned has rows; who looks at the table again is told
        if args[0].version is None:
            raise _written(args[0], name)
        torch.autograd.graph.increment_version(args[0])
    return func(*mapped(args, lambda v: owns.get(id(v), v)), **mapped(kwargs, lambda v: owns.get(id(v), v)))
