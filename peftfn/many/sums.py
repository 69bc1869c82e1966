"""add: the sum of adapters. Of one net, it needs the trees alone; of several, their nets, which say what each means."""

from collections.abc import Mapping
from typing import Any

from peftfn.core import combine
from peftfn.many.conform import conform
from peftfn.net.net import Adapted


def add(*adapters: Mapping[str, Any] | tuple[Adapted, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the adapter whose change of every weight is the sum of theirs: W + Σ_i delta_i(W).

    Every delta is computed at the base weight, so the order does not matter. (`chain` applies methods one after the
    other.) Adapters may cover different sites of the same net. A method whose change depends on the input (`MoELoRA`,
    `Lily`) has no delta: of these, what the layer returns beyond the base's output is summed.

    An adapter is a tree of tensors, which does not say with what alpha, or with what method, it was trained. So give
    adapters of different nets, as `load` returns them, as pairs (net, adapter): each becomes an adapter of the first
    pair's net with the same change (`conform`), or raises an error.

    Args:
        adapters: at least one: adapters of one net, or pairs (net, adapter) of nets on models of the same sizes.

    Returns:
        An adapter of that net; of pairs, of the first one's.

    Raises:
        ValueError: no adapters; or a pair's adapter is none of the first net's, exactly: another method, a larger
            rank, a site that it lacks. It names the site.
        TypeError: an argument is not an adapter or a pair, or some are pairs and some are not.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, b = net.init(seed=0), net.init(seed=1)
        y = net.apply(pf.add(a, pf.scale(b, 0.5)), torch.randn(3, 8))
        other = pf.adapt(net.model, {"0.weight": pf.LoRA(rank=1, alpha=8)})
        y = net.apply(pf.add((net, a), (other, other.init())), torch.randn(3, 8))
    """
    pairs = [x for x in adapters if isinstance(x, tuple)]
    if not pairs:
        return combine.add(*adapters)  # type: ignore[arg-type]
    for i, x in enumerate(adapters):
        if not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], Adapted)):
            what = f"a tuple of {len(x)}" if isinstance(x, tuple) else f"a {type(x).__name__}"
            raise TypeError(f"add: argument {i} is {what}; with pairs, give (net, adapter) for every adapter")
    net = pairs[0][0]
    return combine.add(*(_of(net, other, a, i) for i, (other, a) in enumerate(pairs)))


def _of(net: Adapted, other: Adapted, adapter: Mapping[str, Any], i: int) -> Mapping[str, Any]:
    """The adapter as one of `net`, with a leaf only where it has one."""
    if other is net:
        net.plan.check(adapter)
        return adapter
    try:
        made = conform(adapter, other, net)
    except ValueError as e:
        raise ValueError(
            f"add: adapter {i} is none of the first net's: {e}. Or put the net with the larger rank first; "
            "peftfn.merging.linear([(net, adapter), …]) makes one LoRA of any methods that change weights, and "
            "peftfn.Nets runs several nets in one call"
        ) from e
    return {n: leaf for n, leaf in made.items() if n in adapter or n in net.plan.banks}
