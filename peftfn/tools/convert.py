"""Convert any adapter to LoRAs: its own factors, or the truncated singular value decomposition of its changes."""

from collections.abc import Mapping
from typing import Any

from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted, check_net
from peftfn.tools.change import as_loras, changes, check_energy, check_rank, leaf_of


@checks_numbers
def to_lora(
    net: Adapted, adapter: Mapping[str, Any], *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapted, Adapter]:
    """Convert an adapter to LoRAs with the best approximation of every delta: B = U_r √S_r, A = √S_r V_rᵀ, scale 1.

    Without rank and energy, the conversion is exact: A and B are the method's own factors, which low-rank methods have
    (LoRA, PiSSA, VeRA, …). PiSSA and its like get twice their rank, as in PEFT's conversion of them.

    A change of a layer's bias becomes the LoRA's bias, exactly. Sites that are not matrices (norms, biases) become
    `Full`, exactly. A delta of rank r or less is exact up to rounding.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.
        rank: the rank at every site.
        energy: in (0, 1]: at each site, the smallest rank whose singular values hold this share of Σ σ².

    Returns:
        (net, adapter): a net of LoRAs on the same model, and its adapter.

    Raises:
        ValueError: both rank and energy, or neither for a method without factors; a rank above the size of a site's
            matrix; or a method whose change depends on the input.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoHa(rank=2)})
        lora_net, lora = pf.to_lora(net, net.init(), rank=4)
        assert lora["0.weight"]["a"].shape == (4, 8)
    """
    check_net("to_lora", net)
    if rank is not None and energy is not None:
        raise ValueError(f"to_lora: rank is {rank} and energy is {energy}; give at most one of the two")
    check_energy("to_lora", energy)
    for name, entry in net.plan.items():
        check_rank(name, entry.site, rank)
    return as_loras(net.model, {c.site.name: leaf_of(c, rank, energy) for c in changes(net, adapter)})
