"""Which adapters of a view are active, and what a view adds to the class of its model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from peftfn.core.modules import Companion
from peftfn.core.plan import Entry, Plan
from peftfn.model.names import near
from peftfn.model.place import MODULE, TOKENS
from peftfn.model.site import Site
from peftfn.view.held import Choice, Paths
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
    def use(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Make an adapter active in this thread, or the sum of several, until the block ends; None is the base."""
        active = _checked(self, names, "use")
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

    def use_(self, names: str | Sequence[str] | None) -> None:
        """Make an adapter active in every thread, or the sum of several, where no `use` says otherwise; None is the
        base."""
        self._peftfn.choice.default = _checked(self, names, "use_")

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` of torch.utils.checkpoint: the recomputation uses the adapter that is active now."""
        return nullcontext(), _as_now(self)


def _as_now(view: View) -> AbstractContextManager[None]:
    """In whose block the adapter that is active now is so again, and the sites know what they know now of the call."""
    choice = view._peftfn.choice
    return again(view, choice.active, choice.here.told)


@contextmanager
def again(view: View, active: tuple[str, ...], told: Any) -> Iterator[None]:
    with view.use(active), telling(view._peftfn.choice, told):
        yield


def _checked(view: View, names: Any, what: str) -> tuple[str, ...]:
    """The adapters that a `use` makes active. Raises if they cannot be."""
    state = view._peftfn
    active = () if names is None else (names,) if isinstance(names, str) else names
    if not isinstance(active, (list, tuple)) or not all(isinstance(name, str) for name in active):
        raise TypeError(
            f"{what}: {names!r} is neither a name nor a list of names. For a weighted sum, attach_ a sum of "
            "peftfn.scale(a, s); for one adapter per row, net.mixed"
        )
    for name in active:
        if name not in state.plans:
            raise KeyError(f"{what}: the module has no adapter {name!r}{near(name, list(state.plans))}")
        if name in state.offloaded:
            raise ValueError(f"{what}: adapter {name!r} is offloaded; bring it back with peftfn.onload_(m, {name!r})")
    if len(active) > 1:
        _check_sum(state, active, what)
    return tuple(active)


def _check_sum(state: State, active: Sequence[str], what: str) -> None:
    """ValueError unless these adapters have a sum at every site."""
    if len(set(active)) < len(active):
        raise ValueError(f"{what}: {list(active)} has a name twice; attach_ peftfn.scale(a, 2.0) for twice an adapter")
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
