"""Random draws of one site: the same for the same (seed, name), whatever else is adapted and wherever it runs."""

import hashlib
import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from peftfn.model.site import Site

LARGEST = 2**42
"""Values of a tensor, 16 TiB in fp32: more is a mistake in a number, and torch's own sizes overflow soon after."""


def sized(*shape: int) -> tuple[int, ...]:
    """The shape. ValueError for one that no machine holds."""
    if (n := math.prod(shape)) > LARGEST:
        raise ValueError(f"a tensor {list(shape)} has {n} values, above {LARGEST}: give the method smaller sizes")
    return shape


class Rng:
    """Draws the tensors of one site from a CPU `torch.Generator` seeded by (seed, name).

    Every draw is made in fp32 on the CPU and then moved, so that a seed means the same values on every device.
    On the meta device nothing is drawn: the tensors have shapes and no values. A method receives an `Rng` in `init`.

    Example:
        rng = pf.Rng(0, "layers.0.weight")
        a, b = rng.normal(2, 8, std=0.02), rng.zeros(4, 2)
    """

    def __init__(
        self,
        seed: int,
        name: str,
        *,
        site: Site | None = None,
        sites: Mapping[str, Site] | None = None,
        constants: Mapping[str, Tensor] | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Args:
        seed, name: what the values depend on.
        site: the site of the tensors, for the few methods that need its kind or its own shape; None for tensors that
            the sites of a rule share.
        sites: for shared tensors, the sites that share them, by name.
        constants: the site's `frozen` tensors, so that `init` need not compute them again; empty if there are none yet.
        bias: the layer's bias, for methods that start from it too; None if it has none, and for stacks.
        dtype, device: of what is drawn.
        """
        self.sites, self.constants = sites or {}, constants or {}
        self.dtype, self.device, self.seed, self.site, self.bias = dtype, torch.device(device), seed, site, bias
        try:
            seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"seed is {seed!r}; give an integer") from None
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        self.generator = torch.Generator()
        self.generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def reseeded(self, seed: int) -> "Rng":
        """An `Rng` with the sequence of `torch.manual_seed(seed)`, for every site: as other libraries draw."""
        rng = Rng(seed, "", site=self.site, sites=self.sites, dtype=self.dtype, device=self.device)
        rng.generator.manual_seed(seed)
        return rng

    @property
    def meta(self) -> bool:
        """Whether tensors have no values here."""
        return self.device.type == "meta"

    def _place(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised."""
        return torch.empty(sized(*shape), dtype=self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """All 0."""
        return torch.zeros(sized(*shape), dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Tensor:
        """All 1."""
        return torch.ones(sized(*shape), dtype=self.dtype, device=self.device)

    def full(self, *shape: int, value: float) -> Tensor:
        """All `value`."""
        return torch.full(sized(*shape), value, dtype=self.dtype, device=self.device)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """N(0, std²)."""
        return (
            self.empty(*shape) if self.meta else self._place(torch.randn(sized(*shape), generator=self.generator) * std)
        )

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """U(−bound, bound)."""
        if self.meta:
            return self.empty(*shape)
        return self._place((torch.rand(sized(*shape), generator=self.generator) * 2 - 1) * bound)

    def kaiming(self, *shape: int) -> Tensor:
        """`kaiming_uniform_(a=√5)` of a matrix [rows, fan_in]: U(±1/√fan_in), what `nn.Linear` starts with."""
        return self.uniform(*shape, bound=1 / math.sqrt(max(1, math.prod(shape[1:]))))

    def permutation(self, n: int) -> Tensor:
        """A random permutation of 0 … n−1 (int64)."""
        if self.meta:
            return torch.empty(sized(n), dtype=torch.int64, device=self.device)
        return torch.randperm(*sized(n), generator=self.generator).to(self.device)
