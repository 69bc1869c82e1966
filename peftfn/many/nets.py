"""Several nets on one model as one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftfn.net.net import Adapted
from peftfn.net.run import Runner
from peftfn.slots.gates import Index, Weights


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
        self._runner = Runner(nets[0].model, [net.plan for net in nets])

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
        self._check(stacks)
        return self._runner.batch(Index, stacks, index, args, kwargs, params, method, common)

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
        self._check(stacks)
        return self._runner.batch(Weights, stacks, gates, args, kwargs, params, method, common)

    def _check(self, stacks: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(stacks, Mapping) or len(stacks) != len(self.nets):
            raise ValueError(f"there are {len(self.nets)} nets, and {len(stacks)} stacks; give one stack a net")


def check_nets(what: str, nets: Any) -> None:
    odd = next((n for n in nets if not isinstance(n, Adapted)), None) if isinstance(nets, list | tuple) else nets
    if odd is not None:
        raise TypeError(f"{what}: give a list of nets, which peftfn.adapt makes; this is a {type(odd).__name__}")
    if not nets:
        raise ValueError(f"{what}: give at least one net")
