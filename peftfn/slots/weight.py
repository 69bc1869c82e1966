"""The adapted weight: w + delta, for one parameter during one call."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Method, Product
from peftfn.core.plan import Entry
from peftfn.kernels import choose
from peftfn.kernels.lora_fused import fused_linear
from peftfn.slots.slot import Slot, plus
from peftfn.tensors.operand import dense
from peftfn.tensors.precision import cast, operand_dtype, wide
from peftfn.tensors.transform import exactly, moment


class AdaptedWeight(Slot):
    """w + delta, for one parameter during one call.

    entry: the site and its constants. method, p: what its leaf resolved to, prepared. w: the parameter.
    """

    __slots__ = ("fast", "inside", "method", "p")

    def __init__(self, entry: Entry, method: Method, p: dict[str, Any], w: Tensor, now: tuple[int, bool] | None = None):
        self.entry, self.method, self.p, self.w = entry, method, p, w
        self.fast = entry.fast if method is entry.method else method.fast_linear()
        self.task, self.inside = now or moment()

    def dense(self) -> Tensor:
        return self.entry.dense(self.method, self.p, self.w)

    def product(self, x: Tensor, dot: Product) -> Tensor:
        """dot(x, w + delta) for an input that is no feature vector: an embedding lookup, a convolution."""
        if not self.method.overrides("product"):
            return dot(x, self._matrix())
        dtype = operand_dtype(x) if x.is_floating_point() else self.w.dtype
        return self.method.product(self._operands(dtype), self.canonical(), x, dot)

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        """x (w + delta)ᵀ + bias, the bias as it stands in the layer's slot."""
        dtype = operand_dtype(x) if torch._C._is_any_autocast_enabled() else x.dtype
        m = self.w if self.entry.to_matrix is None else self.entry.to_matrix(self.w)
        if self.entry.site.quantised:
            m = m.to(dtype)
        if not self.fast:
            return plus(F.linear(x, self._matrix().to(m.dtype)), bias)
        if (x.is_cuda or choose.INTERPRETED) and (y := self._fused(x, m, bias)) is not None:
            return y
        # p is prepared in fp32 already, but for an fp64 weight
        p = self.p if dtype is torch.float32 and m.dtype is not torch.float64 else cast(self.p, dtype)
        y = self.method.linear(p, m, x)
        return y if bias is None else plus(y, bias)

    def _fused(self, x: Tensor, m: Tensor, bias: Any) -> Tensor | None:
        """`linear` by a kernel, which reads the prepared tensors in their own dtype and adds the bias at the end; None
        where plain torch has to run."""
        low = self.method.low_rank(self.p)
        if low is None or not low.down.dim() == low.up.dim() == len(m.shape) == 2:
            return None
        inside = bias if isinstance(bias, Tensor) and bias.shape == m.shape[:1] else None
        y = fused_linear(x, m, low.down, low.up, low.scale, c=low.rows, bias=inside, dropout=low.dropout)
        return y if y is None or inside is not None else plus(y, bias)

    def _operands(self, dtype: torch.dtype) -> dict[str, Any]:
        """p in the dtype in which a product runs."""
        if dtype == torch.float32 and self.w.dtype != torch.float64:  # prepared in it already
            return self.p
        return cast(self.p, dtype)

    def _matrix(self) -> Tensor:
        """The dense adapted weight in canonical orientation."""
        m = self.canonical()
        with exactly(m):
            return (wide(m) + self.method.delta(self.p, wide(m))).to(m.dtype)

    def rowed(self, x: Tensor) -> Tensor:
        """x [n, in] with the rows of the batch in the first dimension; they matter in mixed batches alone."""
        return x

    def added_to(self, y: Tensor) -> Tensor:
        return y + self.dense().to(y.dtype)

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], AdaptedWeight):
            args[0]._refuse_write(getattr(func, "__name__", ""))
        return super().call(func, args, kwargs)

    def attribute(self, name: str) -> Any:
        self._refuse_write(name)
        return super().attribute(name)

    def _refuse_write(self, function: str) -> None:
        if function.endswith("_") and not function.endswith("__"):
            raise RuntimeError(
                f"{self.name}: {function} would write to the adapted weight, which is computed anew each time, so the "
                "write would be lost. Write to the base's parameter, or to the adapter's tensors"
            )

    def item_at(self, index: Any) -> Any:
        if self.entry.site.stacked and _picks_one(index):
            return _Expert(self, index)
        return self.dense()[dense(index)]

    def __repr__(self) -> str:
        return f"AdaptedWeight({self.name} {list(self.w.shape)}, {self.method})"


class _Expert(AdaptedWeight):
    """One expert's matrix of an adapted stack: `weight[e]`."""

    __slots__ = ()

    def __init__(self, stack: AdaptedWeight, index: Any):
        p = {
            k: t if axis is None else t[index]
            for (k, t), axis in zip(stack.p.items(), stack.entry.axes(stack.p).values(), strict=True)
        }
        super().__init__(stack.entry, stack.method, p, stack.w[index])

    def canonical(self) -> Tensor:
        return self.w.mT if self.entry.site.kind == "stack_t" else self.w

    def dense(self) -> Tensor:
        return self._matrix().mT if self.entry.site.kind == "stack_t" else self._matrix()

    def item_at(self, index: Any) -> Any:
        return self.dense()[dense(index)]


def _picks_one(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())
