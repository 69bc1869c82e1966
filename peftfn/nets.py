"""Several nets on one model as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftfn.apply import Adapted, current
from peftfn.gated import Gates
from peftfn.many import stack_size, unstacked
from peftfn.mixed import MixedWeight
from peftfn.part import Part
from peftfn.plan import Entry, Plan
from peftfn.route import Route, Rows


class Nets:
    """Several nets on one model as one: batches whose rows use adapters of any of them.

    Adapters are numbered through the nets: those of the first net's stack, then those of the second's, and so on.
    """

    def __init__(self, nets: Sequence[Adapted]):
        check_nets("Nets", nets)
        for net in nets[1:]:
            if net.model is not nets[0].model:
                raise ValueError("Nets: the nets are of different models; adapt one model object with each rule set")
        self.nets = tuple(nets)
        self._union = _Union(self.nets)

    def mixed(
        self,
        stacks: Sequence[Mapping[str, Any]],
        index: Tensor | list[int],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Adapted.mixed` with one stack for each net; differentiable in all of them.

        Args:
            common: patterns, as in rules, of sites whose input all rows have in common, [tokens, …] or [1, tokens, …]
                rather than [rows, tokens, …] (positions that the model counts, say); each row has its own output then.
                None: the model's own tables are known to be so; another input that has 1 or the batch's size in its
                first dimension, and cannot be its rows, is an error.
        """
        count = self._check(stacks)
        rows = Rows.of(index, count, (args, kwargs), self._union._copies(method, args, kwargs)).told(
            common, self._union.plan
        )
        if rows.only is not None:
            net, adapter = self._one(stacks, rows.only)
            return net._run(adapter, None, args, kwargs, params, method)
        return self._union._run(_Stacks(stacks), rows, args, kwargs, params, method)

    def gated(
        self,
        stacks: Sequence[Mapping[str, Any]],
        gates: Tensor | list[Any],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Adapted.gated` with one stack for each net: a weighted sum of adapters of different methods.

        common: as for `mixed`.
        """
        copies = self._union._copies(method, args, kwargs)
        route = Gates.of(gates, self._check(stacks), (args, kwargs), copies, stepwise=method is not None)
        route = route.told(common, self._union.plan)
        return self._union._run(_Stacks(stacks), route, args, kwargs, params, method)

    def _one(self, stacks: Sequence[Mapping[str, Any]], k: int) -> tuple[Adapted, dict[str, Any]]:
        """(the net of adapter k, the adapter)."""
        for net, stacked in zip(self.nets, stacks, strict=True):
            if k < (size := stack_size(stacked)):
                return net, unstacked(stacked, k)
            k -= size
        raise IndexError(k)

    def _check(self, stacks: Sequence[Mapping[str, Any]]) -> int:
        if isinstance(stacks, Mapping) or len(stacks) != len(self.nets):
            raise ValueError(f"there are {len(self.nets)} nets, and {len(stacks)} stacks; give one stack a net")
        for net, stacked in zip(self.nets, stacks, strict=True):
            net.plan.check(stacked, lead=1)
        return sum(map(stack_size, stacks))


def check_nets(what: str, nets: Any) -> None:
    odd = next((n for n in nets if not isinstance(n, Adapted)), None) if isinstance(nets, list | tuple) else nets
    if odd is not None:
        raise TypeError(f"{what}: give a list of nets, which peftfn.adapt makes; this is a {type(odd).__name__}")
    if not nets:
        raise ValueError(f"{what}: give at least one net")


class _Stacks(Mapping[str, Any]):
    """The stacks, read as one adapter: site → {number of the net: its leaf}."""

    def __init__(self, stacks: Sequence[Mapping[str, Any]]):
        self.each = stacks

    def __getitem__(self, name: str) -> dict[str, Any]:
        return {str(i): stacked[name] for i, stacked in enumerate(self.each) if name in stacked}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for stacked in self.each for name in stacked))

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Union(Adapted):
    """The nets' sites together; `_run` with one stack for each net."""

    def __init__(self, nets: Sequence[Adapted]):
        self.nets = nets
        entries: dict[str, Entry] = {}
        for net in nets:
            for name, entry in net.plan.items():
                if name not in entries or entry.changes_bias:  # `Adapted` reads from its plan which biases change
                    entries[name] = entry
        super().__init__(nets[0].model, Plan(entries, {}, {}))

    def _adapted(self, adapter: Any, weight: Any, rows: Route | None = None, training: bool = False) -> dict[str, Any]:
        assert rows is not None
        parts: dict[str, list[Part]] = {}
        start = 0
        for net, stacked in zip(self.nets, adapter.each, strict=True):
            size = stack_size(stacked)
            if rows.uses(start, size):
                entries = net.plan.entries if training else net._meant
                for name, entry in entries.items():
                    bank = self._bank(entry, stacked)
                    part = Part(entry, stacked[name], bank, current(name, entry, weight), start, size)
                    parts.setdefault(name, []).append(part)
            start += size
        out: dict[str, Any] = {name: MixedWeight(some, weight(name), rows) for name, some in parts.items()}
        for name, slot in self._biases.items():
            if name in out:
                new = out[name].bias(out.get(slot, weight(slot)))
                if new is not None:
                    out[slot] = new
        return out
