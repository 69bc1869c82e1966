"""Mixtures whose router trains with its experts."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from peftfn.many.routing import Route
from peftfn.many.stack import stack
from peftfn.net.net import Adapted
from peftfn.slots.routes import PerForward


class Routed:
    """A mixture whose router trains with its experts: a function of one tree, {"experts": stack, "router": …}.

    Args:
        net: the net of the experts.
        experts: how many.
        router: (the router's parameters, site, the site's input) ↦ gates [rows, …, experts].
        init: seed ↦ the router's parameters, any tree of tensors.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        mixture = pf.Routed(net, 3, lambda w, site, x: torch.softmax(x @ w[site].mT, -1),
            lambda seed: {"0.weight": torch.zeros(3, 8)})
        a = mixture.init(seed=0)
        g = torch.func.grad(lambda a: mixture.apply(a, torch.randn(5, 8)).square().mean())(a)
    """

    def __init__(
        self, net: Adapted, experts: int, router: Callable[[Any, str, Tensor], Tensor], init: Callable[[int], Any]
    ):
        if experts < 1:
            raise ValueError(f"Routed: experts is {experts}; give at least 1")
        self.net, self.experts, self.router, self._init = net, experts, router, init

    def init(self, seed: int = 0) -> dict[str, Any]:
        """Return a fresh mixture.

        Args:
            seed: seed of the experts and of the router.

        Returns:
            {"experts": a stack of fresh adapters, "router": what the router's `init` returns}.
        """
        made = [self.net.init(seed=seed * self.experts + k) for k in range(self.experts)]
        return {"experts": stack(made), "router": self._init(seed)}

    def apply(self, adapter: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model with the mixture: `net.gated` with the router's gates at every site.

        Args:
            adapter: a tree like that of `init`.
            args, kwargs: as for `net.gated`.

        Returns:
            The model's output.

        Raises:
            KeyError: `adapter` is no tree of `init`.
        """
        self._check(adapter)
        return self.net.gated(adapter["experts"], self.gates(adapter["router"]), *args, **kwargs)

    def _check(self, adapter: Any) -> None:
        """KeyError unless `adapter` has what a tree of `init` has."""
        if not isinstance(adapter, Mapping) or adapter.keys() != {"experts", "router"}:
            has = sorted(adapter) if isinstance(adapter, Mapping) else type(adapter).__name__
            raise KeyError(f"Routed: the adapter has {has}; give a tree like that of init, with experts and router")

    def gates(self, router: Any) -> Route | PerForward:
        """Return the gates that a router's parameters make, for `net.gated`.

        Args:
            router: the router's parameters.

        Returns:
            Gates.
        """
        return lambda site, x: self.router(router, site, x)
