"""What a view holds at one site: the leaves of its adapters, of which those that are active stand in the slot."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.combine import resolve, total
from peftfn.core.plan import Entry
from peftfn.slots.mixed import MixedWeight
from peftfn.slots.part import Part
from peftfn.slots.values import FAMILIES
from peftfn.tensors.transform import backward_task, exactly, moment
from peftfn.view.choice import Choice

# A name in the tree of an adapter becomes a parameter's name with "/" between its parts and ":" for dots, which torch
# does not allow there.

Paths = list[tuple[tuple[str, ...], str]]
"""(keys in the adapter's tree, name of the parameter), in order"""


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from _flat(v, (*path, k))
        else:
            yield (*path, k), v


def grown(paths: Paths, tensors: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for (*nodes, last), name in paths:
        at = out
        for node in nodes:
            at = at.setdefault(node, {})
        at[last] = tensors[name]
    return out


def hold(module: nn.Module, factors: nn.Module, tree: Mapping[str, Any], trainable: bool, prefix: str = "") -> Paths:
    """Give the tensors of `tree` to `module`, as new parameters.

    The factor of a scaling is a constant unless it requires a gradient, and a new buffer of `factors`.
    """
    paths = []
    for path, t in _flat(tree):
        name = prefix + "/".join(path).replace(".", ":")
        if path[-1] == "scale" and not t.requires_grad:  # a name that no method gives to a tensor
            factors.register_buffer(name, t.detach().clone())
        else:
            module.register_parameter(name, nn.Parameter(t.detach().clone(), trainable))
        paths.append((path, name))
    return paths


def bank_tensors(root: nn.Module, paths: Paths) -> dict[str, Any]:
    """The tensors of a bank by their names in the view, one by one: compiled code depends on no others."""
    params, buffers = root._parameters, root._buffers
    return {name: params[name] if name in params else buffers[name] for _, name in paths}


TAKEN = frozenset({"asked", "choice", "ends", "leaf", "made", "place", "read", "run", "seen", "site", "value"})
"""Names that the modules which hold leaves use themselves."""


class Factors(nn.Module):
    """The factors of a leaf's scalings: buffers that are no constants of the method."""


class Leaf(nn.Module):
    """One adapter at one site."""

    def __init__(
        self,
        entry: Entry,
        tree: Mapping[str, Any],
        root: nn.Module,
        names: Mapping[int, str],
        bank: Paths,
        trainable: bool,
    ):
        super().__init__()  # its own attributes have an underscore: the others' names belong to the methods
        factors = Factors()
        self._paths = hold(self, factors, tree, trainable)
        self._factors = factors if factors._buffers else None
        self._plain = all(path == (name,) for path, name in self._paths)
        self._shared = {k: names[id(t)] for k, t in entry.frozen.items() if id(t) in names}
        for k, t in entry.frozen.items():
            if k not in self._shared:
                self.register_buffer(k, t.detach())
        # The entry reads its constants where `.to` and load_state_dict put them.
        self._entry = replace(entry, frozen=self._buffers)  # type: ignore[arg-type]
        self._meant = replace(self._entry, method=entry.method.eval())
        self._bank = bank
        self._root = (root,) if self._shared or bank else ()  # in a tuple: no submodule of this one

    def _own(self) -> dict[str, Any]:
        """The tensors of its tree by their names in it: its parameters, and the factors of scalings."""
        return self._parameters if self._factors is None else {**self._parameters, **self._factors._buffers}

    def tree(self) -> dict[str, Any]:
        return self._parameters if self._plain else grown(self._paths, self._own())  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return str(self._entry.method)

    def _changes_bias(self) -> bool:
        return self._entry.changes_bias

    @property
    def _gated(self) -> bool:
        return self._entry.gated

    def _tensors(self, w: Any) -> tuple[Entry, Any, dict[str, Any]]:
        """(entry in the present mode, method, prepared tensors) at w."""
        common: dict[str, Any] = {}
        if self._root:
            root = self._root[0]
            shared = {k: root._buffers[name] for k, name in self._shared.items()}
            common = _with(grown(self._bank, bank_tensors(root, self._bank)), shared)
        entry = self._entry if self.training else self._meant
        return entry, *entry.tensors(self.tree(), common, entry.site.canonical(w))

    def adapted(self, w: Any) -> Any:
        """What stands in the slot of the site in place of w: a weight, or the `Place` of a module."""
        entry, method, p = self._tensors(w)
        return FAMILIES[entry.family].single(entry, method, p, w, moment())

    def _each(self, w: Any) -> list[tuple[Entry, Any, dict[str, Any]]]:
        """(entry, method, prepared tensors) of each adapter that is active here."""
        return [self._tensors(w)]


class Several:
    """The leaves of several active adapters at one site: their sum, whose parts have their own constants.

    weights: a factor for each; none is 1 for each.
    """

    def __init__(self, leaves: list[Any], weights: list[float]):
        self.leaves, self.weights, self._entry = leaves, weights, leaves[0]._entry

    def _changes_bias(self) -> bool:
        return any(leaf._changes_bias() for leaf in self.leaves)

    @property
    def _gated(self) -> bool:
        return any(leaf._gated for leaf in self.leaves)

    def _each(self, w: Any) -> list[tuple[Entry, Any, dict[str, Any]]]:
        parts = [leaf._tensors(w) for leaf in self.leaves]
        if not self.weights:
            return parts
        with exactly(self._entry.site.canonical(w)):
            weighed = zip(parts, self.weights, strict=True)
            return [(entry, *_scaled(method, p, s)) for (entry, method, p), s in weighed]

    def adapted(self, w: Any) -> Any:
        parts, entry = self._each(w), self._entry
        if len(parts) == 1:
            return FAMILIES[entry.family].single(*parts[0], w, moment())
        with exactly(entry.site.canonical(w)):
            method, p = total([(method, p) for _, method, p in parts])
        return FAMILIES[entry.family].single(parts[0][0], method, p, w, moment())


def _scaled(method: Any, p: dict[str, Any], s: float) -> tuple[Any, dict[str, Any]]:
    """What `scale` makes of an adapter, of one that is prepared."""
    return resolve(method, {"scale": torch.tensor(s), "of": {}}, {}, lambda leaf, bank: p)


def _with(bank: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """The bank and the shared constants, at every term of a sum or scaling."""
    return shared | {k: _with(v, shared) if isinstance(v, dict) else v for k, v in bank.items()}


class Held(nn.ModuleDict):
    """The parametrization of an adapted parameter: adapter's name → its leaf here."""

    def __init__(self, name: str, choice: Choice, leaves: dict[str, nn.Module], read: Callable[[Tensor], Any]):
        super().__init__(leaves)
        self.site, self.choice = name, choice
        self.read: Callable[[Tensor], Any] = read  # the parameter ↦ what methods take for the weight

    def leaf(self) -> Any:
        """The leaf of the active adapter, the sum of several, or None."""
        choice = self.choice
        # is_compiling comes first: compiled code must not depend on how many adapters there are.
        if not torch.compiler.is_compiling() and choice.several and not choice.here.pinned and backward_task() != -1:
            raise RuntimeError(
                f"{self.site}: recomputed in a backward pass, which does not know which of the module's adapters was "
                "active in the forward pass. Turn checkpointing on with gradient_checkpointing_enable(), or pass "
                "context_fn=m.checkpoint_context and use_reentrant=False to torch.utils.checkpoint"
            )
        modules, (names, weights) = self._modules, choice.active
        if len(names) == 1 and not weights:  # the common case in the fewest steps
            leaf = modules.get(names[0])
            if leaf is None or isinstance(leaf, Leaf):
                return leaf
        leaves = [modules[name] for name in names if name in modules]
        for leaf in leaves:
            if not isinstance(leaf, Leaf):
                raise RuntimeError(
                    f"{self.site}: a {type(leaf).__name__} is around this adapter's leaf, which is read, never called, "
                    "so it would have a part of its numbers. Wrap whole layers: FullyShardedDataParallel(m, "
                    "auto_wrap_policy=ModuleWrapPolicy({the class of a layer}), use_orig_params=True)"
                )
        if len(leaves) > 1 or (leaves and weights):
            here = [s for name, s in zip(names, weights, strict=True) if name in modules] if weights else []
            return Several(leaves, here)
        return leaves[0] if leaves else None

    def made(self, leaf: Any, w: Any) -> Any:
        """What stands in the slot in place of w, with the leaf of the active adapter or the sum of several."""
        return self._acting(leaf._each(w), w) if leaf._gated else leaf.adapted(w)

    def _acting(self, active: list[tuple[Entry, Any, dict[str, Any]]], w: Any) -> MixedWeight:
        """The same where a method acts on some tokens alone. active: (entry, method, prepared tensors)."""
        told = self.choice.here.told
        kinds = [(entry.method if entry.gated else None, 1) for entry, _, _ in active]
        if told is None:
            method = next(method for method, _ in kinds if method is not None)
            raise ValueError(
                f"{self.site}: {method} acts on some tokens alone, which the token ids say that the whole module is "
                "called with, and here a part of it was called by itself: call what as_module returned, or its generate"
            )
        parts = [Part.alone(entry, method, p, w, k) for k, (entry, method, p) in enumerate(active)]
        return MixedWeight(parts, w, told.gates(self.site, kinds))

    def forward(self, w: Any) -> Any:
        leaf, w = self.leaf(), self.read(w)
        if leaf is None:
            return w
        value = self.made(leaf, w)
        return value.dense() if leaf._entry.site.kind == "other" and not leaf._gated else value


def itself(w: Any) -> Any:
    return w
