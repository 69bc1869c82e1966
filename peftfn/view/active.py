"""Which adapters of a view are active, and what a view adds to the class of its model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from peftfn.core.modules import Companion
from peftfn.core.plan import Entry, Plan
from peftfn.model.names import near
from peftfn.model.place import MODULE, TOKENS
from peftfn.model.site import Site
from peftfn.view.choice import Active, Choice
from peftfn.view.held import Paths
from peftfn.view.told import telling


@dataclass
class State:
    """What a view stores about its adapters."""

    plans: dict[str, Plan]
    banks: dict[str, dict[str, Paths]]
    choice: Choice
    offloaded: set[str]
    buffers: dict[str, Tensor]  # the base's own, that a checkpoint has and training may change
    constants: set[str]  # names of the root's buffers that hold constants of several leaves
    # The slots that the view was made with: what adapters may come in later.
    sites: dict[str, Site]
    companions: set[tuple[str, Companion]]  # (site, what its methods put at another module)


class View:
    """What `as_module` adds to the model's class."""

    _peftfn: State
    saver: ClassVar[Callable[..., None] | None] = None
    """What save_pretrained calls. The package sets it: this room may not import the one that writes files."""

    @contextmanager
    def use(self, names: str | Sequence[str] | None, weights: float | Sequence[float] | None = None) -> Iterator[None]:
        """Make an adapter active in this thread, or the sum of several, until the block ends; None is the base.

        weights: what the change of each adapter is multiplied by, as by `scale`: a number for each name. The adapters
        themselves, in `adapter_of` and in files, are without them.
        """
        active = _checked(self, names, weights, "use")
        choice = self._peftfn.choice
        here = choice.here
        before = here.active, here.pinned
        choice.blocks.append(active)
        here.active, here.pinned = active, True
        try:
            yield
        finally:
            here.active, here.pinned = before
            choice.blocks.remove(active)

    def use_(self, names: str | Sequence[str] | None, weights: float | Sequence[float] | None = None) -> None:
        """Make an adapter active in every thread, or the sum of several, where no `use` says otherwise; None is the
        base. weights: as of `use`."""
        self._peftfn.choice.default = _checked(self, names, weights, "use_")

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` of torch.utils.checkpoint: the recomputation uses the adapter that is active now."""
        return nullcontext(), _as_now(self)


def _as_now(view: View) -> AbstractContextManager[None]:
    """In whose block the adapter that is active now is so again, and the sites know what they know now of the call."""
    choice = view._peftfn.choice
    return again(view, choice.active, choice.here.told)


@contextmanager
def again(view: View, active: Active, told: Any) -> Iterator[None]:
    with view.use(active.names, active.weights or None), telling(view._peftfn.choice, told):
        yield


def _checked(view: View, names: Any, weights: Any, what: str) -> Active:
    """The adapters that a `use` makes active. Raises if they cannot be."""
    state = view._peftfn
    active = () if names is None else (names,) if isinstance(names, str) else names
    if not isinstance(active, (list, tuple)) or not all(isinstance(name, str) for name in active):
        raise TypeError(
            f"{what}: {names!r} is neither a name nor a list of names. For a weighted sum, {what}([…], weights=[…]); "
            "for one adapter per row, net.mixed"
        )
    for name in active:
        if name not in state.plans:
            raise KeyError(f"{what}: the module has no adapter {name!r}{near(name, list(state.plans))}")
        if name in state.offloaded:
            raise ValueError(f"{what}: adapter {name!r} is offloaded; bring it back with peftfn.onload_(m, {name!r})")
    if len(active) > 1:
        _check_sum(state, active, what)
    return Active(tuple(active), _weights(state, names, active, weights, what))


def _weights(state: State, names: Any, active: Sequence[str], given: Any, what: str) -> tuple[float, ...]:
    """The factors of a `use`; none where each is 1."""
    if given is None:
        return ()
    weights = [given] if isinstance(names, str) and not isinstance(given, (list, tuple)) else given
    if not isinstance(weights, (list, tuple)) or len(weights) != len(active):
        raise ValueError(f"{what}: weights is {given!r}; give a number for each of {list(active)}")
    for s in weights:
        if not isinstance(s, Real) or isinstance(s, bool) or not isfinite(s):
            raise ValueError(
                f"{what}: weights has {s!r}; a weight is a finite number. One that trains is a tensor of "
                "peftfn.scale, in an adapter that attach_ adds"
            )
    for name in active:
        for e in state.plans[name].values():
            if not e.method.combines:
                raise ValueError(f"{what}: {e.site.label}: {e.method} of {name!r} cannot be scaled; leave weights out")
    return () if all(s == 1 for s in weights) else tuple(map(float, weights))


def _check_sum(state: State, active: Sequence[str], what: str) -> None:
    """ValueError unless these adapters have a sum at every site."""
    if len(set(active)) < len(active):
        raise ValueError(f"{what}: {list(active)} has a name twice; for twice an adapter, weights=[2.0]")
    first: dict[str, tuple[str, Entry]] = {}
    for name in active:
        for at, e in state.plans[name].items():
            other, f = first.setdefault(at, (name, e))
            if name != other and not _have_sum(e, f):
                raise ValueError(
                    f"{what}: {e.site.label}: {f.method} of {other!r} and {e.method} of {name!r} have no sum; make one "
                    "of them active at a time"
                )


def _have_sum(e: Entry, f: Entry) -> bool:
    """Whether leaves of these entries of one site can be active together."""
    one = e.method == f.method
    if e.site.kind in (MODULE, TOKENS):
        return one and e.method.combines
    if one and e.method.overrides("summed"):  # it has a closed form
        return True
    # W + Σ delta, or Σ of what each gives; methods name for themselves which tensors the experts of a stack share
    if one and not e.method.mergeable:
        return e.method.combines
    each = ((e, e.method), (f, f.method))
    return all(m.combines and (m.mergeable or at.gated) for at, m in each) and (one or not e.site.stacked)
