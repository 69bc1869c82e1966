"""Rows followed through modules that move positions: experts, windows, packed and flattened tokens.

While a routed module runs in a mixed batch, a TorchFunctionMode sees every function of torch in it. A tensor whose rows
are known has its tag as an attribute; a rule for each function (following/) says what the output's is. A function
without a rule loses the rows, and the site that gets such an input raises, naming that function. Nothing is guessed.

A tag holds for the values that were there when it was set: a write through another view makes it out of date.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftfn.slots.gates import Gates
from peftfn.slots.tags import Lost, Unfollowed
from peftfn.tensors.arguments import memory, storages, tensors
from peftfn.tensors.lent import writes

_KEY = "_peftfn_rows"
_active = threading.local()


class Seen:
    """A function of torch, its arguments, and the tags that they had before it ran."""

    __slots__ = ("args", "f", "kwargs", "name", "tags", "tracking")

    def __init__(self, tracking: "Tracking", f: Any, args: Any, kwargs: Any, tags: dict[int, Tensor | Lost]):
        self.tracking, self.f, self.args, self.kwargs, self.tags = tracking, f, args, kwargs, tags
        self.name = getattr(f, "__name__", "")

    def arg(self, i: int, name: str, default: Any = None) -> Any:
        return self.args[i] if len(self.args) > i else self.kwargs.get(name, default)

    def rows(self, x: Any) -> Tensor | None:
        """x's tag; None if it has no rows. Unfollowed if they are lost."""
        tag = self.tags.get(id(x))
        if isinstance(tag, Lost):
            raise Unfollowed(tag.why)
        return tag

    def maybe(self, x: Any) -> Tensor | None:
        """x's tag; None also if its rows are lost: for what flows into positions that are another's."""
        tag = self.tags.get(id(x))
        return None if isinstance(tag, Lost) else tag

    def must(self, x: Any) -> Tensor:
        tag = self.rows(x)
        if tag is None:
            raise Unfollowed("only its other inputs have rows")
        return tag


Tags = Tensor | Lost | None | list[Tensor | None]
Rule = Callable[[Seen, Any], Tags]
"""(function with its arguments, what it gave) ↦ the tag of that, or of each of several"""


class Followed:
    """What is followed in one call: the gates, and the rows of the inputs of modules whose first dimension has none.

    owners: module → the row of each of the leading positions of its input.
    """

    def __init__(self, gates: Gates, owners: Mapping[str, Tensor]):
        self.gates, self.owners = gates, owners

    def entering(self, module: str, given: Any) -> list[tuple[Tensor, Tensor]]:
        """The tensors among a module's inputs that have rows, with the rows of their leading positions."""
        owner, inputs = self.owners.get(module), tensors(given)
        if owner is not None:
            found = [(x, owner.to(x.device)) for x in inputs if x.shape[: owner.dim()] == owner.shape]
            if not found:
                raise ValueError(
                    f"owners: {module or 'the model'} gets inputs of shapes {[list(x.shape) for x in inputs]}, and "
                    f"owners has {list(owner.shape)} for it: give the row of each position of its input"
                )
            return found
        return [(x, rows) for x in inputs if (rows := self._by_size(x)) is not None]

    def _by_size(self, x: Tensor) -> Tensor | None:
        gates = self.gates
        counted = not x.is_floating_point() and not storages([x]) <= gates.inputs
        if getattr(x, "each", None) is not None:
            return None  # a table of each row's own (unrowed.py)
        if gates.owned(x) or not gates.size or (counted and (x.dim() < 2 or x.shape[0] == x.shape[1])):
            return None  # the model's own, or positions, it may be
        n, tokens = gates.size, gates.tokens
        if tokens is None:
            if gates.at(x.shape[0]) is None:
                return None
            return torch.arange(x.shape[0], device=x.device) // (x.shape[0] // n)
        if x.dim() < 2 or x.shape[0] != n:
            return None
        at = None if gates.steps is None else gates.steps.positions(x.shape[1], tokens, x.device)
        if at is None and x.shape[1] != tokens:
            return None
        return torch.arange(n, device=x.device)[:, None] * tokens + (
            torch.arange(tokens, device=x.device) if at is None else at
        )


def current() -> "Tracking | None":
    """The tracking of the routed module that runs now."""
    return None if torch.compiler.is_compiling() else getattr(_active, "top", None)


class Tracking(TorchFunctionMode):
    """Follows the rows of one call's batch while a routed module runs."""

    def __init__(self, call: Followed, rules: Mapping[Any, Rule], silent: frozenset[Any], leaks: frozenset[Any]):
        super().__init__()
        self.call, self.rules, self.silent, self.leaking = call, rules, silent, leaks
        self.made: dict[Any, Any] = {}  # what was found for tags; it keeps them
        self.writes: dict[int, int] = {}  # to tensors of inference mode, which count none
        self.leaked: dict[int, Any] = {}  # memory that somebody may write to unseen
        self.paused = False

    def __enter__(self) -> "Tracking":
        self.outer, _active.top = getattr(_active, "top", None), self
        super().__enter__()
        return self

    def __exit__(self, *e: Any) -> None:
        super().__exit__(*e)
        _active.top = self.outer

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is our own, and sets tags itself."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def get(self, x: Tensor) -> Tensor | Lost | None:
        held = getattr(x, _KEY, None)
        if held is None or held[0] is not self:
            return None
        if self.leaked and memory(x) in self.leaked:
            return Lost("its memory was handed out, and writes to that cannot be seen")
        now = self.writes.get(memory(x), 0) if x.is_inference() else x._version
        if held[2] != now and not isinstance(held[1], Lost):
            return Lost("it was written to through another view of it")
        tag: Tensor | Lost = held[1]
        return tag

    def put(self, x: Any, tag: Tensor | Lost | None) -> Any:
        if isinstance(x, Tensor):
            if tag is None:
                x.__dict__.pop(_KEY, None)
            else:
                x.__dict__[_KEY] = self, tag, self.writes.get(memory(x), 0) if x.is_inference() else x._version
        return x

    def begin(self, x: Tensor, rows: Tensor) -> None:
        """x belongs to `rows` in its leading positions."""
        self.put(x, rows.view(*rows.shape, *[1] * (x.dim() - rows.dim())))

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or f in self.silent or not (tags := self._tags(args, kwargs)):
            return f(*args, **kwargs)
        seen = Seen(self, f, args, kwargs, tags)
        if f in self.leaking:
            storage = args[0].untyped_storage()
            self.leaked[storage.data_ptr()] = storage  # kept, so that no other tensor gets this memory
        if torch.is_inference_mode_enabled() and (writes(seen.name) or kwargs.get("out") is not None):
            for v in _tensors_in((args[0] if args else None, kwargs.get("out")), {}):
                if v.is_inference():
                    at = memory(v)
                    self.writes[at] = self.writes.get(at, 0) + 1
        out = f(*args, **kwargs)
        if isinstance(out, Tensor) and id(out) not in tags and getattr(out, _KEY, (None,))[0] is self:
            return out  # a site has set it
        self._spread(args[0] if seen.name == "__setitem__" else out, self._tag_of(seen, out))
        return out

    def _tags(self, args: Any, kwargs: Any) -> dict[int, Tensor | Lost]:
        """The tags of a function's tensors, those in lists and tuples too. One call, whatever it is called with."""
        tags: dict[int, Tensor | Lost] = {}
        for v in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(v, Tensor):
                if getattr(v, _KEY, None) is not None and (tag := self.get(v)) is not None:
                    tags[id(v)] = tag
            elif isinstance(v, list | tuple):
                for w in v:
                    if (
                        isinstance(w, Tensor)
                        and getattr(w, _KEY, None) is not None
                        and (tag := self.get(w)) is not None
                    ):
                        tags[id(w)] = tag
        return tags

    def of_output(self, f: Any, args: Any, kwargs: Any, out: Any) -> Tags:
        """The tag of what a function of some tensors gave."""
        return self._tag_of(Seen(self, f, args, kwargs, self._tags(args, kwargs)), out)

    def _tag_of(self, seen: Seen, out: Any) -> Tags:
        rule, into = self.rules.get(seen.f), seen.kwargs.get("out") is not None
        why = " writes to out=" if into else " has no rule"
        if rule is not None and not into:
            try:
                return rule(seen, out)
            except Unfollowed as e:
                why = f": {e}"
            except Exception as e:  # the function itself has run: a rule that fails must not stop the model
                why = f": its rule does not know this use of it ({type(e).__name__}: {e})"
        lost = next((t for t in seen.tags.values() if isinstance(t, Lost)), None)
        return lost or Lost(f"{getattr(seen.f, '__qualname__', seen.name or str(seen.f))}{why}")

    def _spread(self, out: Any, tags: Tags) -> None:
        if isinstance(out, list | tuple):
            for i, o in enumerate(out):
                self._spread(o, tags[i] if isinstance(tags, list) else tags)
        else:
            self.put(out, tags[0] if isinstance(tags, list) else tags)

    def again(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Callable[..., Any]:
        """`run`, which may run once more later, with other tensors of the same values: they get the tags of these."""
        held = [self.get(x) for x in tensors((args, kwargs))]

        def call(*args: Any, **kwargs: Any) -> Any:
            for x, tag in zip(tensors((args, kwargs)), held, strict=True):
                self.put(x, tag)
            if current() is self:
                return run(*args, **kwargs)
            with self:
                return run(*args, **kwargs)

        return call


def _tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for v in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, list | tuple):
            found += [w for w in v if isinstance(w, Tensor)]
    return found
