"""Quantised weights: a value that stands for the weight of a layer whose weight cannot be read as a matrix.

Such a layer is known by what it does: x ↦ x Wᵀ, with its own kernel. A `QuantisedWeight` takes W's place in a method's
formulas. `F.linear(x, weight)` runs the layer's kernel, and every other function sees W dequantised, which each kind
knows how to do. So additive methods (LoRA, VeRA …) never touch W, and those that compute with W (DoRA's norms, PiSSA's
factors) still mean what they say. The kinds are in `quantised_layers.py`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from peftfn.tensors.lent import beneath
from peftfn.tensors.operand import Operand


class QuantisedWeight(Operand):
    """W [out, in] of a layer, as an operand: `F.linear` runs the layer, everything else sees W dequantised."""

    parameter: ClassVar[str] = ""
    """The class name of its parameter, where that is no plain one."""
    own_forward: ClassVar[bool] = False
    """Whether the layer has a forward of its own instead of calling `F.linear` on its weight."""
    requires_grad = False

    def __init__(self, layer: nn.Module, name: str, shape: Size, dtype: torch.dtype | None = None):
        self.layer: Any = layer
        self.name, self.shape, self._dtype = name, shape, dtype

    # What a kind of layer tells of itself: `recognises`, `times` and `matrix`, and the others where it knows better.

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        """Whether the layer, which is no embedding and has no plain floating-point weight, is of this kind."""
        raise NotImplementedError

    def problem(self) -> str | None:
        """Why the layer cannot be adapted as it is, and the cure."""
        return None

    def stored_dtype(self) -> torch.dtype:
        """The dtype W had before it was quantised, as far as the layer remembers."""
        for t in (self.bias(), *self._tensors()):
            if t is not None and t.is_floating_point() and t.dtype.itemsize > 1:
                return t.dtype
        return torch.get_default_dtype()

    def times(self, x: Tensor) -> Tensor:
        """x [n, in] ↦ x Wᵀ [n, out], by the layer's kernel, without the bias."""
        raise NotImplementedError

    def times_transposed(self, g: Tensor) -> Tensor:
        """g [n, out] ↦ g W [n, in]: the gradient of `times`."""
        return g @ self.to(g.dtype).dense()

    def matrix(self) -> Tensor:
        """W dequantised, in any floating dtype."""
        raise NotImplementedError

    @staticmethod
    def share(p: Any) -> nn.Parameter:
        """A parameter like p, the layer's own, that shares its storage."""
        return nn.Parameter(p.detach(), requires_grad=False)

    def requantise(self, w: Tensor) -> Tensor:
        """A parameter like the layer's own that holds w [out, in], for `merge`."""
        raise ValueError(
            f"{self.name}: {type(self.layer).__name__} cannot be made from a dense weight here, so there is nothing to "
            "merge into. Keep the adapter beside it (net.apply, or a saved adapter), or adapt and merge the model as "
            "it was before it was quantised, and quantise the result."
        )

    # What all have in common.

    def bias(self) -> Tensor | None:
        b = getattr(self.layer, "bias", None)
        return b if isinstance(b, Tensor) else None

    def _tensors(self) -> list[Tensor]:
        return [t for d in (self.layer._parameters, self.layer._buffers) for t in d.values() if t is not None]

    def linear(self, x: Tensor) -> Tensor:
        """x [..., in] ↦ x Wᵀ [..., out]; differentiable in x, under every transform."""
        if torch.compiler.is_compiling():  # the compiler traces the kernel itself
            return _rows(self.times, x)
        y: Tensor = _Product.apply(x, self.times, self.times_transposed)  # type: ignore[no-untyped-call]
        return y

    def dense(self) -> Tensor:
        """W dequantised, in `dtype`."""
        try:
            with torch.no_grad(), beneath():  # W depends on no transform, and a library's function may know none
                return self.matrix().to(self.dtype)
        except Exception as e:
            raise ValueError(
                f"{self.name}: {type(self.layer).__name__} cannot be dequantised here ({type(e).__name__}: {e}), and "
                "something asks for the weight itself. Choose a method that only adds to the layer's output, like "
                "LoRA, or dequantise the model first."
            ) from e

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._dtype or self.stored_dtype()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    def is_inference(self) -> bool:
        return True  # nothing that counts versions

    def detach(self) -> "QuantisedWeight":
        return self

    def float(self) -> Any:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another dtype, W is still out of sight; anything else makes it dense."""
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return type(self)(self.layer, self.name, self.shape, args[0])
        return self.dense().to(*args, **kwargs)

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.linear and not kwargs and len(args) == 2 and isinstance(args[0], Tensor):
            return args[1].linear(args[0])
        if func in _LIKE:  # W's values do not matter
            return _LIKE[func](args[0].shape, **{"dtype": args[0].dtype, "device": args[0].device, **kwargs})
        return super().call(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return self.attribute(name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name} {list(self.shape)}, {type(self.layer).__name__})"


_LIKE: dict[Any, Any] = {torch.empty_like: torch.empty, torch.zeros_like: torch.zeros, torch.ones_like: torch.ones}


_Map = Callable[[Tensor], Tensor]


def _rows(product: _Map, x: Tensor) -> Tensor:
    """A product of [n, in] on x [..., in]: kernels differ in how many dimensions they take."""
    y = product(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    """x ↦ times(x), linear in x, whose derivative is `back`. Nothing of the weight's size is ever kept.

    Both are the bound methods of a `QuantisedWeight`, which itself would take part in torch's function dispatch.
    """

    @staticmethod
    def forward(x: Tensor, times: _Map, back: _Map) -> Tensor:
        return _rows(times, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.times, ctx.back = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Product.apply(g, ctx.back, ctx.times).to(ctx.dtype), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        out: Tensor = _Product.apply(t, ctx.times, ctx.back)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, times: _Map, back: _Map) -> tuple[Tensor, int]:  # type: ignore[override]
        return _Product.apply(x.movedim(in_dims[0], 0), times, back), 0  # type: ignore[no-untyped-call]
