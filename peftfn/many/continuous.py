"""Continuous batching: transformers' own manager drives a model whose requests each use an adapter of their own."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from peftfn.core.plan import Plan
from peftfn.many.bank import Bank
from peftfn.many.nets import Nets
from peftfn.many.residents import BASE
from peftfn.model.names import near
from peftfn.net.net import Adapted
from peftfn.tensors.tree import stack_size

_OURS = ("allow_block_sharing", "use_cuda_graph", "use_async_batching")
"""Settings of transformers' that must be off."""
_BYPASSES = ("generate", "forward", "generate_batch", "continuous_batching_context_manager")
"""What a model has, and what would run it without adapters."""
_DONE = ("FINISHED", "FAILED")


class Continuous:
    """A model with many adapters, as transformers' continuous batching takes it: what `continuous` returns.

    It has the model's attributes (`config`, `device`, …), and its call looks up whose each token of a packed batch is.

    Args:
        of: a bank, whose adapters have names; or a net.
        stacked: of a net: `stack` of its adapters, which have numbers then.

    Raises:
        ValueError, TypeError: as for `continuous`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        served = pf.continuous(net, pf.stack([net.init(0), net.init(1)]))
        assert isinstance(served, pf.Continuous) and served.eval() is served
    """

    _cached_continuous_batching_manager: Any = None  # of this, not of the model

    def __init__(self, of: Adapted | Nets | Bank, stacked: Any = None):
        self.of, self.stacked = of, stacked
        nets = of.nets.nets if isinstance(of, Bank) else of.nets if isinstance(of, Nets) else (of,)
        for net in nets:
            _check_acting(net.plan)
        self.plans = [net.plan for net in nets]
        self.model = nets[0].model
        self._lock = Lock()
        self._adapters: dict[str, Any] = {}  # request → its adapter
        self._prompts: dict[str, list[int]] = {}  # request → its tokens, where adapters act on some alone
        self._states: dict[str, Any] = {}  # request → transformers' own record of it, once it has run
        self._manager: Any = None
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        if name in _BYPASSES:
            raise AttributeError(
                f"continuous: {name} of the model would run without adapters: use init_continuous_batching(…), "
                "add_request(ids, adapter) and the manager's get_result()"
            )
        if name == "model":  # in a copy that has none yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def eval(self) -> "Continuous":
        """Return itself: the manager keeps what this returns. The model must be in eval mode.

        Returns:
            This object.

        Raises:
            ValueError: it is in training mode.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), {"0.weight": pf.LoRA(rank=2)})
            served = pf.continuous(net, pf.stack([net.init()]))
            assert served.eval() is served
        """
        if getattr(self.model, "config", None) is not None and self.model.training:
            raise ValueError("continuous: the model is in training mode: call model.eval() first")
        return self

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, **more: Any
    ) -> Any:
        """Return transformers' `ContinuousBatchingManager`, which runs this model: `start()`, `get_result()`, `stop()`.

        Adapters must not share cache blocks, which transformers finds by their tokens alone, so block sharing is off;
        so are CUDA graphs, which would replay the adapters of one batch, and asynchronous batching, which prepares a
        batch while another runs.

        Args:
            generation_config, continuous_batching_config, more: as for a model of transformers. None: its defaults.

        Returns:
            The manager. Add requests by `add_request` of this object, not of the manager.

        Raises:
            ValueError: this object has a manager already, or the model is in training mode.
            TypeError: the model is none of transformers' that generates.

        Example:
            # manager = served.init_continuous_batching(generation_config)
            # manager.start()
            # served.add_request([3, 1, 4], "ann", max_new_tokens=8)
            assert hasattr(pf.Continuous, "init_continuous_batching")
        """
        init = getattr(type(self.model), "init_continuous_batching", None)
        if init is None:
            raise TypeError(
                f"continuous: {type(self.model).__name__} has no init_continuous_batching: give a net of one of "
                "transformers' models that generate"
            )
        if self._manager is not None:
            raise ValueError("continuous: this object has a manager already; call pf.continuous again for another one")
        from transformers import ContinuousBatchingConfig

        config: Any = (
            ContinuousBatchingConfig() if continuous_batching_config is None else copy(continuous_batching_config)
        )
        for name in _OURS:
            setattr(config, name, False)
        self._manager = init(self, generation_config, config, **more)
        return self._manager

    def add_request(
        self, input_ids: Sequence[int] | Tensor, adapter: Any = None, *, request_id: str | None = None, **more: Any
    ) -> str:
        """Add a request that uses an adapter.

        Args:
            input_ids: the prompt.
            adapter: a name in the bank, or a number in the stack. None, "__base__" or −1: the base.
            request_id: its name; None: made up.
            more: as for `add_request` of transformers' manager (`max_new_tokens`, `streaming`, …).

        Returns:
            The request's name, which is that of its results.

        Raises:
            KeyError: the bank has no adapter of this name.
            ValueError: the stack has no adapter of this number, or another request has this name; the requests that run
                and wait use as many adapters as the bank has slots; there is no manager, or it takes no requests.

        Example:
            # served.add_request([3, 1, 4], "ann", max_new_tokens=8)
            assert hasattr(pf.Continuous, "add_request")
        """
        if self._manager is None:
            raise ValueError("continuous: call init_continuous_batching first, and start the manager that it returns")
        chosen = self._checked(adapter)
        with self._lock:
            self._forget()
            name = f"request {self._count}" if request_id is None else request_id
            self._count += 1
            if name in self._adapters:
                raise ValueError(f"continuous: there is a request {name!r} already")
            if isinstance(self.of, Bank):
                self.of.check([*self._adapters.values(), chosen])
            self._adapters[name] = chosen
        ids = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        if any(plan.gated for plan in self.plans):
            self._prompts[name] = ids
        taken = None
        try:
            taken = self._manager.add_request(input_ids=ids, request_id=name, **more)
        finally:
            if taken is None:
                self._drop(name)
        if taken is None:
            raise ValueError("continuous: the manager takes no requests: it has been stopped, or has failed")
        return name

    def _checked(self, adapter: Any) -> Any:
        if isinstance(self.of, Bank):
            name = BASE if adapter is None else adapter
            if name != BASE and name not in self.of:
                raise KeyError(f"continuous: the bank has no adapter {name!r}{near(str(name), list(self.of.names))}")
            return name
        k, count = -1 if adapter is None else adapter, _count(self.stacked)
        if not isinstance(k, int) or not -1 <= k < count:
            raise ValueError(f"continuous: there is no adapter {k!r}; the stack has {count} (−1 is the base)")
        return k

    def _forget(self) -> None:
        """Requests that are done need their adapters no more."""
        for name in [n for n, s in self._states.items() if s.status.name in _DONE]:
            self._drop(name)
            del self._states[name]

    def _drop(self, name: str) -> None:
        self._adapters.pop(name, None)
        self._prompts.pop(name, None)

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        """One step of the manager: packed tokens [1, n] of several requests, one after the other."""
        packed = self._packed()
        if not isinstance(self.of, Bank):
            stacks = [self.stacked] if isinstance(self.stacked, Mapping) else self.stacked
            index = self._index(input_ids, inputs, packed, stacks, {k: k for _, k, _ in packed})
            return self.of.mixed(self.stacked, index, input_ids=input_ids, **inputs)
        names = list(dict.fromkeys([BASE, *(name for _, name, _ in packed)]))
        with self.of.holding(names, timeout=None) as (stacks, numbers):
            number = dict(zip(names, numbers.tolist(), strict=True))
            index = self._index(input_ids, inputs, packed, stacks, number)
            return self.of.nets.mixed(stacks, index, input_ids=input_ids, **inputs)

    def _packed(self) -> list[tuple[str, Any, int]]:
        """(request, its adapter, how many tokens of it) in the order in which they stand in the batch."""
        out: list[tuple[str, Any, int]] = []
        for request in self._manager.batch_processor.inputs_and_outputs.requests_in_batch:
            state = request.state
            name = state.request_id.partition("__child#")[0]  # several sequences of one prompt
            if name not in self._adapters:
                self._unknown(name)
            self._states[name] = state
            out.append((name, self._adapters[name], request.query_length))
        return out

    def _index(
        self,
        input_ids: Tensor,
        inputs: Mapping[str, Any],
        packed: Sequence[tuple[str, Any, int]],
        stacks: Sequence[Any],
        number: Mapping[Any, int],
    ) -> Tensor:
        """The adapter of each token [1, n]: padding has the base, and tokens on which the adapter does not act."""
        own: list[int] = []
        plans = [plan for plan, stack in zip(self.plans, stacks, strict=True) for _ in range(stack_size(stack))]
        for name, adapter, many in packed:
            k = number[adapter]
            if k < 0 or not plans[k].gated:
                own += [k] * many
                continue
            acts = _acts(plans[k], self._prompts[name])
            at = inputs["position_ids"].flatten()[len(own) : len(own) + many].tolist()
            own += [k if acts[min(i, len(acts) - 1)] else -1 for i in at]
        return torch.tensor([own + [-1] * (input_ids.shape[1] - len(own))], device=input_ids.device)

    def _unknown(self, name: str) -> NoReturn:
        raise ValueError(
            f"continuous: request {name!r} was added without an adapter: add requests by add_request(ids, adapter) of "
            "what pf.continuous returns, not of its manager"
        )


def _check_acting(plan: Plan) -> None:
    """ValueError for a plan whose methods act on some tokens alone at some sites: a token has one adapter, or none."""
    if plan.gated and (len(plan.gated) < len(plan) or len({plan[n].method for n in plan.gated}) > 1):
        first = plan.gated[0]
        other = next(n for n in plan if n not in plan.gated or plan[n].method != plan[first].method)
        raise ValueError(
            f"continuous: {plan[first].method} at {first} acts on some tokens alone, and {plan[other].method} at "
            f"{other} on others: in a packed batch each token has one adapter or the base. Use one method at all sites"
        )


def _acts(plan: Plan, ids: Sequence[int]) -> list[bool]:
    """On which tokens of a prompt the adapters of a plan act."""
    gates: Tensor = plan.meant[plan.gated[0]].method.acts_on(torch.tensor([list(ids)]))
    return [bool(g) for g in gates[0].tolist()]


def _count(stacked: Any) -> int:
    trees: Iterable[Any] = [stacked] if isinstance(stacked, Mapping) else stacked
    return sum(len(next(iter(next(iter(tree.values())).values()))) for tree in trees)


def continuous(of: Adapted | Nets | Bank, stacked: Any = None) -> Continuous:
    """Return the model with many adapters, for transformers' continuous batching.

    Args:
        of: a bank: adapters by name, fetched when their requests run. Or a net, or several (`Nets`).
        stacked: of a net: a `stack` of its adapters; of several: a list of stacks.

    Returns:
        A `Continuous`: `init_continuous_batching` makes transformers' own manager, `add_request(ids, adapter)` adds
        requests to it. Each request has the tokens that `generate` gives it with its adapter.

    Raises:
        ValueError: a net without a stack, or a bank with one; or a net whose methods act on some tokens alone at some
            of its sites.
        TypeError: neither a net nor a bank.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        served = pf.continuous(pf.bank({"ann": (net, net.init(0)), "bob": (net, net.init(1))}))
    """
    if not isinstance(of, Adapted | Nets | Bank):
        raise TypeError(f"continuous: give a bank, or a net and a stack of its adapters; this is a {type(of).__name__}")
    if isinstance(of, Bank) != (stacked is None):
        what = "a bank has its adapters itself" if isinstance(of, Bank) else "give the net's adapters, pf.stack([…])"
        raise ValueError(f"continuous: {what}")
    return Continuous(of, stacked)
