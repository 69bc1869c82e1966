"""Stack k adapters of the same structure into one tree with a leading axis of size k, and split one again."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from peftfn.core.combine import is_expression
from peftfn.tensors.tree import stack_size, unstacked

Names = Sequence[str | int]
"""What errors call the adapters: their names, or their numbers."""


def stack(adapters: Iterable[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Stack k adapters of the same structure into one tree with a leading axis of size k.

    The result is for `vmap`, `net.mixed`, `net.gated`, or training many adapters at once. A stack has no names: adapter
    i is the i-th of the list or dict, so `list(adapters).index(name)` is the index of a name, and `unstack(stacked,
    adapters)` returns a dict again. For calls by name, see `bank`.

    Args:
        adapters: adapters of one net: a list, a generator, or a dict {name: adapter}.

    Returns:
        A tree like each adapter, whose tensors are [k, …]: copies.

    Raises:
        ValueError: there are none, or two adapters differ in their structure, a shape, a dtype or a device; it names
            the first place.
        TypeError: `adapters` is one adapter, or has something else in it.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack(net.init(seed=s) for s in range(3))
        assert many["0.weight"]["a"].shape == (3, 2, 8)
        named = {"ann": net.init(seed=0), "bob": net.init(seed=1)}
        y = net.mixed(pf.stack(named), [list(named).index("bob"), -1], torch.randn(2, 8))
    """
    if isinstance(adapters, Mapping):
        for name, a in adapters.items():
            if isinstance(a, Mapping) and (is_expression(a) or not all(isinstance(v, Mapping) for v in a.values())):
                raise TypeError(
                    f"stack: this is one adapter, with the site {name!r}; give several, in a list or in a dict by name"
                )
        names, trees = list(adapters), list(adapters.values())
    elif isinstance(adapters, Iterable) and not isinstance(adapters, Tensor | str):
        trees = list(adapters)
        names = list(range(len(trees)))  # type: ignore[arg-type]
    else:
        raise TypeError(f"stack: give adapters in a list or a dict, not a {type(adapters).__name__}")
    if not trees:
        raise ValueError("stack: give at least one adapter")
    return _joined(trees, names, "")


def _joined(trees: Sequence[Mapping[str, Any]], names: Names, path: str) -> dict[str, Any]:
    first, out = trees[0], {}
    for name, other in zip(names, trees, strict=True):
        if not isinstance(other, Mapping):
            what = f"{path.rstrip('/') or 'it'} is a {type(other).__name__}"
            raise TypeError(f"stack: {what} in adapter {name!r}; give a dict of tensors")
        if other.keys() != first.keys():
            odd = path + next(k for k in [*first, *other] if (k in first) != (k in other))
            raise ValueError(
                f"stack: adapters {names[0]!r} and {name!r} differ at {odd}, which only one of them has: stack "
                "adapters of one net"
            )
    for k, t in first.items():
        values = [tree[k] for tree in trees]
        out[k] = _joined(values, names, f"{path}{k}/") if isinstance(t, Mapping) else _stacked(values, names, path + k)
    return out


def _stacked(ts: list[Any], names: Names, path: str) -> Tensor:
    for i, t in zip(names, ts, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"stack: {path} is a {type(t).__name__} in adapter {i!r}; give a tensor")
        where = f"in adapter {names[0]!r} and", f"in adapter {i!r}"
        if t.shape != ts[0].shape:
            raise ValueError(
                f"stack: {path} has shape {list(ts[0].shape)} {where[0]} {list(t.shape)} {where[1]}: "
                "adapters of different ranks do not stack; fit them to one net with peftfn.conform"
            )
        if t.dtype != ts[0].dtype or t.device != ts[0].device:
            raise ValueError(
                f"stack: {path} is {ts[0].dtype} on {ts[0].device} {where[0]} {t.dtype} on {t.device} {where[1]}: "
                "convert them to the same dtype and device"
            )
    return torch.stack(ts)


@overload
def unstack(stacked: Mapping[str, Any], names: None = None) -> list[dict[str, Any]]: ...
@overload
def unstack(stacked: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]: ...
def unstack(
    stacked: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[dict[str, Any]] | dict[str, dict[str, Any]]:
    """Split a stack into its adapters.

    Args:
        stacked: what `stack` returned; each tensor is [k, …].
        names: a name for each adapter, in order: the dict that was stacked, say.

    Returns:
        A list of k adapters, or a dict of them by name; their tensors are views of the stack's.

    Raises:
        ValueError: the number of names is not k.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, b = pf.unstack(pf.stack([net.init(seed=0), net.init(seed=1)]))
        named = {"ann": a, "bob": b}
        assert pf.unstack(pf.stack(named), named).keys() == named.keys()
    """
    each = [unstacked(stacked, i) for i in range(stack_size(stacked))]
    if names is None:
        return each
    names = list(names)
    if len(set(names)) != len(each):
        raise ValueError(f"unstack: {len(names)} names, {len(set(names))} of them different, for {len(each)} adapters")
    return dict(zip(names, each, strict=True))
