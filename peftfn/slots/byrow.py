"""A slot whose value depends on the row of a mixed batch, and torch's functions of it.

A function runs once for each adapter, on the rows that use it. Where the rows are comes from the sizes of its inputs;
inside a routed module, from their tags alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftfn.slots import batch, track
from peftfn.slots.attention import attend
from peftfn.slots.gates import Gates
from peftfn.slots.part import Cut
from peftfn.slots.pertoken import PerToken
from peftfn.slots.recurrent import RECURRENT, recur
from peftfn.slots.slot import Slot
from peftfn.slots.tags import Lost, RowsLost, constant
from peftfn.slots.unrowed import Unrowed, owned
from peftfn.tensors.arguments import mapped, tensors, visit


class ByRow(Slot):
    """A slot whose value depends on the row. `value(k)` is adapter k's, value(-1) the base's."""

    __slots__ = ("inside", "rows")
    rows: Gates

    @staticmethod
    def gates_of(held: Any) -> Gates:
        gates: Gates = held.rows
        return gates

    @property
    def by_itself(self) -> bool:  # type: ignore[override]
        return self.rows.sealed

    def _gates(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Gates:
        """The gates with f of their tensor: one object for all slots, since it keeps what they share."""
        if id(self.rows) not in made:
            made[id(self.rows)] = self.rows.mapped(f)
        return made[id(self.rows)]  # type: ignore[no-any-return]

    def value(self, k: int) -> Any:
        raise NotImplementedError

    def chosen(self, k: int) -> Any:
        """What stands here where all rows use adapter k."""
        return self.value(k)

    def lost(self, what: str, more: str = "") -> RowsLost:
        wanted = (
            "its rows and tokens in the first two dimensions" if self.rows.tokens else "its rows in the first dimension"
        )
        inside = self.tracking() is not None
        need = "must know whose each position is" if inside else f"needs {wanted}"
        cure = "" if inside else 'If modules move them, name these, or "", the whole model, in adapt(…, routed=[…]). '
        text = f"{self.name}: {what}, and a mixed batch of {self.rows.size} rows {need}. {more}"
        return RowsLost(
            f"{text}{cure}Call net.apply for one adapter at a time, or leave this site out of the rules.", text.strip()
        )

    # Inside a routed module only tags count, never sizes.

    def tracking(self) -> track.Tracking | None:
        """What follows the rows of this call here, if anything does."""
        if self.rows.call is None:
            return None
        t = track.current()
        return t if t is not None and t.call is self.rows.call else None

    def tag(self, t: track.Tracking | None, x: Tensor) -> Tensor | None:
        """x's tag; None where all rows are alike. ValueError if it has none."""
        if self.rows.size is None:
            return None
        tag = None if t is None else t.get(x)
        if tag is None or isinstance(tag, Lost):
            why = "" if tag is None else f": {tag.why}"
            raise self.lost(f"the rows of its input {list(x.shape)} are not known{why}")
        return tag

    def placed(self, t: track.Tracking | None, x: Tensor, tag: Tensor | None, lead: int) -> tuple[Gates, Tensor | None]:
        """(gates of x's positions, their tag): x's first `lead` dimensions are positions, the others one vector."""
        if tag is None or t is None:
            return self.rows, None
        key = id(tag), x.shape[:lead], id(self.rows)
        if key not in t.made:
            one = constant(tag, range(lead, x.dim()))
            if one is None:
                raise self.lost(f"the vectors of its input {list(x.shape)} belong to several rows")
            owner = one.expand(*x.shape[:lead], *one.shape[lead:]).flatten()
            t.made[key] = tag, self.rows, self.rows.of_positions(owner, t.call.gates.tokens), one
        return t.made[key][2:]  # type: ignore[no-any-return]

    def doubtful(self, what: str) -> ValueError:
        return ValueError(
            f"{self.name}: {what}, so its {self.rows.size} entries are not the batch's {self.rows.size} rows. Name "
            "the site in common=[…] if all rows have this input in common; give common=[] if it has them."
        )

    def rowed(self, x: Tensor) -> Tensor:
        if self.rows.size is None or self.tracking() is not None:
            return x
        if x.dim() != 2 or not self.rows.size or x.shape[0] % self.rows.size:
            raise self.lost(f"its input has shape {list(x.shape)}")
        return x.view(self.rows.size, -1, x.shape[-1])

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        found: list[ByRow] = []
        visit((args, kwargs), lambda v: found.append(v) if isinstance(v, ByRow) else None)
        rows, first = found[0].rows, found[0]
        if kwargs.get("out") is not None:
            raise first.lost(f"{getattr(func, '__name__', func)} writes to out=")
        if (out := first.own(func, args, kwargs)) is not NotImplemented:
            return out
        if func is F.multi_head_attention_forward:
            return attend(first, args, kwargs)
        if func in RECURRENT:
            return recur(first, func, args, kwargs)
        if isinstance(rows, PerToken) or first.tracking() is not None:
            return first.by_position(func, args, kwargs)
        sizes = {v.shape[0] for v in tensors((args, kwargs)) if not owned(v, rows) and rows.at(v.shape[0])}
        bags = func is F.embedding_bag and args[0].dim() == 1  # all rows' indices in one line, cut up by offsets
        if (not sizes or bags) and rows.size is not None:
            raise found[0].lost(f"{getattr(func, '__name__', func)} does not have them there")
        if any(isinstance(v, Unrowed) and v.each is not None for v in tensors((args, kwargs))):
            raise found[0].lost(f"{getattr(func, '__name__', func)} has an input that is another table for each row")
        n = max(sizes, default=0)
        together = func is F.batch_norm and _training(*args, **kwargs)

        def run(k: int, cut: Cut) -> Tensor:
            def swap(v: Any) -> Any:
                if isinstance(v, ByRow):
                    return v.value(k)
                has_rows = isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == n and not owned(v, rows)
                return cut(v) if has_rows and not together else v

            out: Tensor = func(*mapped(args, swap), **mapped(kwargs, swap))
            return cut(out) if together else out

        return batch.each(rows.at(n) or rows, run)

    def own(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of torch that this slot computes in a way of its own; NotImplemented: it does not."""
        return NotImplemented

    def by_position(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of one tensor of positions [positions …, the weight's dimensions …], such as a norm."""
        t, name = self.tracking(), getattr(func, "__name__", str(func))
        rows: Any = self.rows
        has = (lambda v: rows.flattened(v) is not None) if t is None else (lambda v: t.get(v) is not None)
        given = [v for v in tensors((args, kwargs)) if has(v)]
        if t is not None and (not given or (name in _PRODUCTS and given[0] is not args[0])):
            return _of_tables(func, args, kwargs)
        if len(given) != 1 or func is F.embedding_bag:
            raise self.lost(f"{name} has {len(given)} inputs whose rows are known")
        x = given[0]
        of_images = name.startswith(("conv", "batch_norm", "group_norm", "instance_norm"))
        features = 0 if not x.is_floating_point() else 1 if name in _PRODUCTS else max(1, self.w.dim())
        lead = 1 if of_images else max(1, x.dim() - features)
        if t is None and lead < 2:
            raise self.lost(f"{name} has an input of shape {list(x.shape)}")
        gates, tag = (rows.flattened(x), None) if t is None else self.placed(t, x, self.tag(t, x), lead)
        together = func is F.batch_norm and _training(*args, **kwargs)

        def run(k: int, cut: Cut) -> Tensor:
            def swap(v: Any) -> Any:
                if isinstance(v, ByRow):
                    return v.value(k)
                return cut(v.reshape(-1, *v.shape[lead:])) if v is x and not together else v

            out: Tensor = func(*mapped(args, swap), **mapped(kwargs, swap))
            return cut(out) if together else out

        with nullcontext() if t is None else t.aside():
            y = batch.each(gates, run)
            y = y.view(*x.shape[:lead], *y.shape[1:])
        return y if t is None else t.put(y, tag if tag is None else fitted(tag, lead, y.dim()))

    def attribute(self, name: str) -> Any:
        if not hasattr(self.w, name):
            raise AttributeError(f"{self.name} has no {name}")
        if name in ("mul_", "div_"):
            return self._times
        if self.tracking() is None or name.endswith("_") or name == "data":
            raise self.lost(f"the model uses weight.{name}")
        return getattr(self.as_table(), name)

    def item_at(self, index: Any) -> Any:
        if self.tracking() is None:
            raise self.lost("the model indexes the weight")
        return self.as_table()[index]

    def _times(self, factor: Any) -> "ByRow":
        """The model scales its weight in place: by 1 it stays what it is."""
        if isinstance(factor, Tensor) or factor != 1:
            raise self.lost(f"the model scales the weight in place, by {factor}")
        return self

    def as_table(self) -> Tensor:
        """What stands here, for functions of the weight alone: another tensor for each row."""
        rows, n = self.rows, self.rows.size
        if n is None or rows.tokens is not None:
            raise self.lost("the model computes with the weight itself")

        def run(k: int, cut: Cut) -> Tensor:
            w = self.value(k)
            return cut(w.expand(n, *w.shape))

        each = batch.each(rows, run)
        return Unrowed.of(each[0], rows, each, self.name)


def _of_tables(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of weights and of what has no rows, or none of positions: each row's weight is a table of its own."""
    made: dict[int, Tensor] = {}

    def swap(v: Any) -> Any:
        if isinstance(v, ByRow) and id(v) not in made:
            made[id(v)] = v.as_table()
        return made.get(id(v), v)

    return func(*mapped(args, swap), **mapped(kwargs, swap))


def _training(
    input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *_: Any, **__: Any
) -> bool:
    """Whether F.batch_norm normalises by the statistics of the batch, which are of all rows together."""
    return training


_PRODUCTS = frozenset(["linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm"])


def fitted(tag: Tensor, lead: int, dims: int) -> Tensor:
    """The tag of positions, for an output of so many dimensions: the same object where it fits, which others know."""
    return (
        tag
        if tag.dim() == dims and tag.shape[lead:].numel() == 1
        else tag.view(*tag.shape[:lead], *[1] * (dims - lead))
    )
