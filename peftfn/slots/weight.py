"""The adapted weight: w + delta, for one parameter during one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import LowRank, Product, Weight
from peftfn.core.plan import WeightEntry
from peftfn.kernels import choose
from peftfn.kernels.lora_linear import lora_first, lora_linear
from peftfn.slots.slot import Slot, check, plus
from peftfn.tensors.lent import Computed
from peftfn.tensors.narrow import Narrow, half_of
from peftfn.tensors.operand import Operand, dense
from peftfn.tensors.precision import cast, operand_dtype, wide
from peftfn.tensors.transform import eager, exactly, in_function, moment


class AdaptedWeight(Slot):
    """w + delta, for one parameter during one call.

    entry: the site and its constants. method, p: what its leaf resolved to, prepared. w: the parameter.
    """

    __slots__ = ("fast", "inside", "low", "method", "p")

    def __init__(
        self, entry: WeightEntry, method: Weight, p: dict[str, Any], w: Tensor, now: tuple[int, bool] | None = None
    ):
        self.entry, self.method, self.p, self.w = entry, method, p, w
        self.fast = entry.fast if method is entry.method else method.fast_linear()
        self.task, self.inside = now or moment()
        self.low = method.low_rank(p) if entry.low else None

    def forward(self, x: Tensor) -> Tensor:
        if self.task != torch._C._current_graph_task_id() or (not self.inside and in_function()):
            check((self,), None)
        low, w, bias = self.low, self.w, self.held["bias"]
        # the common case in the fewest steps: a low-rank change of a plain matrix, and one dtype
        alike = (
            low is not None
            and isinstance(x, Tensor)
            and x.dtype is w.dtype is low.down.dtype
            and not isinstance(bias, Operand)
            and not self.entry.site.quantised
        )
        if low is None or not alike or torch._C._is_any_autocast_enabled():
            return super().forward(x)
        m = w if self.entry.to_matrix is None else self.entry.to_matrix(w)
        if low.gain is None and not low.dropout and not choose.fits(x) and eager(x):
            return lora_first(x, m, low.down, low.up, low.scale, bias)
        return lora_linear(x, m, low.down, low.up, low.scale, c=low.gain, bias=bias, dropout=low.dropout)

    def mapped(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> "AdaptedWeight":
        w = f(self.w) if isinstance(self.w, Tensor) else self.w
        return AdaptedWeight(self.entry, self.method, {k: f(t) for k, t in self.p.items()}, w)

    def dense(self) -> Tensor:
        return self.entry.dense(self.method, self.p, self.w)

    def product(self, x: Tensor, dot: Product) -> Tensor:
        """dot(x, w + delta) for an input that is no feature vector: an embedding lookup, a convolution."""
        dtype = operand_dtype(x) if x.is_floating_point() else self.w.dtype
        if self.entry.fp32 and (half := half_of(dtype, self.w.dtype)):
            return self._product_in_fp32(x, dot, half).to(dtype)
        if not self.method.overrides("product"):
            return dot(x, self._matrix())
        return self.method.product(self._operands(dtype), self.canonical(), x, dot)

    def _product_in_fp32(self, x: Tensor, dot: Product, half: torch.dtype) -> Tensor:
        """`product` of whose parts that with the base's weight alone is in half precision."""
        numbers = x.is_floating_point()

        def each(x: Tensor, m: Any) -> Tensor:
            m = m.w.to(half) if isinstance(m, Narrow) else m
            return wide(dot(x.to(m.dtype) if numbers else x, m))  # a lookup of indices stays one

        with exactly(self.w):
            x = x.float() if numbers else x
            if not self.method.overrides("product"):
                return each(x, self._matrix(torch.float32))
            return self.method.product(self.p, Narrow(self.canonical(), half), x, each)  # type: ignore[arg-type]

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        """x (w + delta)ᵀ + bias, the bias as it stands in the layer's slot."""
        dtype = operand_dtype(x) if torch._C._is_any_autocast_enabled() else x.dtype
        m = self.w if self.entry.to_matrix is None else self.entry.to_matrix(self.w)
        if self.entry.site.quantised:
            m = m.to(dtype)
        if self.entry.fp32 and (half := half_of(dtype, m.dtype)):
            with exactly(x):
                return self._linear(x.float(), Narrow(m, half), torch.float32, bias).to(dtype)
        return self._linear(x, m, dtype, bias)

    def _linear(self, x: Tensor, m: Any, dtype: torch.dtype, bias: Any) -> Tensor:
        """`linear` with m, the base's weight [out, in] or what stands for it; the adapter's operands in `dtype`."""
        if not self.fast:
            dense = self._matrix(m.dtype) if isinstance(m, Narrow) else self._matrix().to(m.dtype)
            return plus(F.linear(x, dense), bias)
        if self.low is not None and (y := self._low_rank(x, m, dtype, self.low, bias)) is not None:
            return y
        return plus(self.method.linear(self._operands(dtype), m, x), bias)

    def _low_rank(self, x: Tensor, m: Any, dtype: torch.dtype, low: LowRank, bias: Any) -> Tensor | None:
        """`linear` where it is a low-rank change of a matrix; None where it is one of a stack.

        A kernel reads the prepared tensors in their own dtype; plain torch has them in the dtype of the product.
        """
        if not low.down.dim() == low.up.dim() == len(m.shape) == 2:
            return None
        down, up, scale, c, dropout = low
        inside = bias if isinstance(bias, Tensor) and bias.shape == m.shape[:1] else None
        if down.dtype != dtype and not choose.fits(x):
            down, up, c = down.to(dtype), up.to(dtype), None if c is None else c.to(dtype)
        y = lora_linear(x, m, down, up, scale, c=c, bias=inside, dropout=dropout)
        return y if bias is None or inside is not None else plus(y, bias)

    def _operands(self, dtype: torch.dtype) -> dict[str, Any]:
        """p in the dtype in which a product runs."""
        if dtype == torch.float32 and self.w.dtype != torch.float64:  # prepared in it already
            return self.p
        return cast(self.p, dtype)

    def _matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense adapted weight in canonical orientation, in the weight's own dtype or in `dtype`."""
        m = self.canonical()
        with exactly(m):
            return (wide(m) + self.method.delta(self.p, wide(m))).to(dtype or m.dtype)

    def rowed(self, x: Tensor) -> Tensor:
        """x [n, in] with the rows of the batch in the first dimension; they matter in mixed batches alone."""
        return x

    def added_to(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        return y + self.dense().to(y.dtype)

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], AdaptedWeight):
            args[0]._refuse_write(getattr(func, "__name__", ""))
        return super().call(func, args, kwargs)

    def attribute(self, name: str) -> Any:
        if name in ("mul_", "div_"):
            return self._times
        self._refuse_write(name)
        value = self.dense()
        return getattr(Computed.of(value, self.name) if name in ("data", "detach") else value, name)

    def _times(self, factor: Any) -> "AdaptedWeight":
        """The model scales its weight in place: by 1 it stays what it is."""
        if isinstance(factor, Tensor) or factor != 1:
            raise self._unwritten(f"scaling it in place by {factor}")
        return self

    def _refuse_write(self, function: str) -> None:
        if function.endswith("_") and not function.endswith("__"):
            raise self._unwritten(function)

    def _unwritten(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: {what} would write to the adapted weight, which is computed anew each time, so the write "
            "would be lost. Write to the base's parameter, or to the adapter's tensors"
        )

    def item_at(self, index: Any) -> Any:
        if self.entry.site.stacked and picks_one(index):
            axes = self.entry.axes(self.p)
            p = {k: t if axes[k] is None else t[index] for k, t in self.p.items()}
            return Expert(self.entry, self.method, p, self.w[index])
        value = self.dense()[dense(index)]
        return value if torch.is_grad_enabled() else Computed.of(value, self.name)  # where a forward could write to it

    def __repr__(self) -> str:
        return f"AdaptedWeight({self.name} {list(self.w.shape)}, {self.method})"


class Expert(AdaptedWeight):
    """One expert's matrix of an adapted stack, `weight[e]`: its own tensors, the stack's entry."""

    __slots__ = ()

    def canonical(self) -> Tensor:
        return self.w.mT if self.entry.site.kind == "stack_t" else self.w

    def dense(self) -> Tensor:
        return self._matrix().mT if self.entry.site.kind == "stack_t" else self._matrix()

    def item_at(self, index: Any) -> Any:
        return self.dense()[dense(index)]


def picks_one(index: Any) -> bool:
    """Whether an index of a stack names one expert."""
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())
