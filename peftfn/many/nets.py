"""Run adapters of several nets in one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftfn.net.net import Adapted
from peftfn.net.run import Runner
from peftfn.slots import pertoken, routes
from peftfn.slots.routes import Gating


class Nets:
    """Run adapters of several nets on one model in one batch: of different methods, ranks and targets.

    Adapters are numbered through the nets: those of the first net's stack, then those of the second's, and so on.

    Args:
        nets: at least one, all on the same model object.

    Raises:
        ValueError: no nets, or nets on different models.
        TypeError: not a list of nets.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        one, two = (pf.adapt(model, {"0.weight": m}) for m in (pf.LoRA(rank=2), pf.IA3()))
        stacks = [pf.stack([one.init()]), pf.stack([two.init()])]
        y = pf.Nets([one, two]).mixed(stacks, [0, 1, -1], torch.randn(3, 8))  # row 0: one, row 1: two, row 2: base
    """

    def __init__(self, nets: Sequence[Adapted]):
        check_nets("Nets", nets)
        for net in nets[1:]:
            if net.model is not nets[0].model:
                raise ValueError(
                    "Nets: the nets adapt different models; call adapt on one model object for each rule set"
                )
        self.nets = tuple(nets)
        again = dict.fromkeys(name for net in nets for name in net.again)
        self._runner = Runner.of(nets[0].model, [net.plan for net in nets], list(again), [net.routed for net in nets])

    def mixed(
        self,
        stacks: Sequence[Mapping[str, Any]],
        index: Tensor | list[int],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        owners: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a batch whose row i uses adapter index[i], counted through all stacks. See `Adapted.mixed`.

        Args:
            stacks: one stack for each net, in the order of the nets.
            index: [rows] or [rows, tokens] integers in [−1, number of adapters); −1 is the base.
            args, kwargs, params, method, common, owners: as for `Adapted.mixed`.

        Returns:
            The model's output, differentiable in all stacks.

        Raises:
            ValueError: another number of stacks than of nets; or as for `Adapted.mixed`.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            one, two = (pf.adapt(model, {"0.weight": m}) for m in (pf.LoRA(rank=2), pf.IA3()))
            stacks = [pf.stack([one.init()]), pf.stack([two.init()])]
            y = pf.Nets([one, two]).mixed(stacks, [1, 0], torch.randn(2, 8))
        """
        self._check(stacks)
        return self._runner.batch(pertoken.of, stacks, index, args, kwargs, params, method, common, owners)

    def gated(
        self,
        stacks: Sequence[Mapping[str, Any]],
        gates: Gating,
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        owners: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a batch with a weighted sum of adapters, also of different methods. See `Adapted.gated`.

        Args:
            stacks: one stack for each net, in the order of the nets.
            gates: as for `Adapted.gated`, K being the number of adapters in all stacks.
            args, kwargs, params, method, common, owners: as for `Adapted.mixed`.

        Returns:
            The model's output, differentiable in the gates and in all stacks.

        Raises:
            ValueError: another number of stacks than of nets; or as for `Adapted.gated`.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            one, two = (pf.adapt(model, {"0.weight": m}) for m in (pf.LoRA(rank=2), pf.IA3()))
            stacks = [pf.stack([one.init()]), pf.stack([two.init()])]
            y = pf.Nets([one, two]).gated(stacks, [0.3, 0.7], torch.randn(2, 8))
        """
        self._check(stacks)
        return self._runner.batch(routes.of, stacks, gates, args, kwargs, params, method, common, owners)

    def _check(self, stacks: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(stacks, Mapping) or len(stacks) != len(self.nets):
            given = "one adapter or stack" if isinstance(stacks, Mapping) else f"{len(stacks)} stacks"
            raise ValueError(
                f"Nets: there are {len(self.nets)} nets, and you gave {given}: give a list, one stack a net"
            )


def check_nets(what: str, nets: Any) -> None:
    odd = next((n for n in nets if not isinstance(n, Adapted)), None) if isinstance(nets, list | tuple) else nets
    if odd is not None:
        raise TypeError(f"{what}: give a list of nets, which peftfn.adapt returns; this is a {type(odd).__name__}")
    if not nets:
        raise ValueError(f"{what}: give at least one net")
