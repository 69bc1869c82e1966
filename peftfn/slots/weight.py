"""The adapted weight: what stands in a parameter's slot during a call.

It is a plain object that takes part in torch's function dispatch (`__torch_function__`). The products in `_PRODUCTS`
reach the method's fast form; metadata is the parameter's own; **everything else sees the dense adapted weight**, so
an adapter can be slow somewhere but never dropped. A plain object rather than a tensor subclass: nothing can fall
through to a kernel that would read the unadapted storage, there is no dispatch key to get wrong under a transform, and
`torch.compile` traces it in less than half the time (docs/design.md has the measurement).
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import LINEAR, Product, Weight
from peftfn.core.plan import Entry
from peftfn.kernels import choose
from peftfn.kernels.lora_fused import fused_linear
from peftfn.tensors.precision import wide
from peftfn.tensors.transform import autocast, backward_task, exactly, in_function, moment

OUTLIVED = (
    "{name}: used after its call was over. torch.utils.checkpoint recomputes during backward, when the tensors of the "
    "call have left the model: turn checkpointing on with the model's gradient_checkpointing_enable(), which peftfn "
    "follows, give the model's own torch.utils.checkpoint use_reentrant=False and context_fn=net.checkpoint_context, "
    "or wrap the whole of net.apply in torch.utils.checkpoint."
)


class Slot:
    """Whatever stands in a parameter's slot during a call: what it is asked for by torch, and where that goes.

    task: the backward pass in which the call runs (−1: none). A recomputation that belongs to another call comes in
    another one, and must not read this call's weights. inside: made inside an autograd.Function's forward, where
    nothing is recorded, so there is no gradient to lose.
    """

    __slots__ = ("__weakref__", "entry", "task", "w")  # RNNs keep weak references to their weights
    task: int
    multiplies = True  # has `linear` and `product`
    inside: bool = False
    entry: Entry
    w: Tensor

    @property
    def name(self) -> str:
        return self.entry.site.name

    def canonical(self) -> Tensor:
        return self.entry.site.canonical(self.w)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling():
            _check(args, kwargs)
        product = _PRODUCTS.get(func)
        out = NotImplemented if product is None else product(*args, **(kwargs or {}))
        return cls._call(func, args, kwargs or {}) if out is NotImplemented else out

    @classmethod
    def _call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """Any function that is not one of the products."""
        raise NotImplementedError

    def _attribute(self, name: str) -> Any:
        """Any attribute that is not metadata."""
        raise NotImplementedError

    # Metadata: what the parameter and the value in its slot have in common.
    shape = property(lambda self: self.w.shape)
    dtype = property(lambda self: self.w.dtype)
    device = property(lambda self: self.w.device)
    ndim = property(lambda self: self.w.ndim)
    layout = property(lambda self: self.w.layout)
    is_meta = property(lambda self: self.w.is_meta)
    is_cuda = property(lambda self: self.w.is_cuda)
    is_sparse = property(lambda self: self.w.is_sparse)
    is_quantized = property(lambda self: self.w.is_quantized)
    is_nested = property(lambda self: self.w.is_nested)

    def size(self, dim: int | None = None) -> Any:
        return self.w.size() if dim is None else self.w.size(dim)

    def dim(self) -> int:
        return self.w.dim()

    def numel(self) -> int:
        return self.w.numel()

    def is_floating_point(self) -> bool:
        return self.w.is_floating_point()

    def __len__(self) -> int:
        return len(self.w)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return self._attribute(name)


def _operators() -> None:
    """Python's operators on a slot go the way of torch's functions."""

    def make(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
        def operate(self: Slot, *others: Any) -> Any:
            args = (*others, self) if reflected else (self, *others)
            if not torch.compiler.is_compiling():
                _check(args, None)
            return type(self)._call(function, args, {})

        return operate

    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"]:
        setattr(Slot, f"__{name}__", make(getattr(operator, name), False))
        setattr(Slot, f"__r{name}__", make(getattr(operator, name), True))
    for name in ["neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge"]:
        setattr(Slot, f"__{name}__", make(getattr(operator, name), False))
    Slot.__hash__ = object.__hash__  # type: ignore[method-assign]


_operators()


class AdaptedWeight(Slot):
    """w + delta, for one parameter during one call.

    entry: the site and its constants. method, p: what its leaf resolved to, prepared. w: the parameter.
    """

    __slots__ = ("inside", "method", "p")

    def __init__(self, entry: Entry, method: Weight, p: dict[str, Any], w: Tensor, now: tuple[int, bool] | None = None):
        self.entry, self.method, self.p, self.w = entry, method, p, w
        self.task, self.inside = now or moment()

    def dense(self) -> Tensor:
        return self.entry.dense(self.method, self.p, self.w)

    def product(self, x: Tensor, dot: Product) -> Tensor:
        """dot(x, w + delta) for an input that is no feature vector: an embedding lookup, a convolution."""
        if not self.method.overrides("product"):
            return dot(x, self._matrix())
        dtype = _operand_dtype(x) if x.is_floating_point() else self.w.dtype
        return self.method.product(self._operands(dtype), self.canonical(), x, dot)

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        """x (w + delta)ᵀ + bias, the bias as it stands in the layer's slot."""
        dtype, m = _operand_dtype(x), self.canonical()
        if self.entry.site.quantised:
            m = m.to(dtype)
        if not self.method.fast_linear():
            return plus(F.linear(x, self._matrix().to(m.dtype)), bias)
        if (x.is_cuda or choose.INTERPRETED) and (y := self._fused(x, m, bias)) is not None:
            return y
        return plus(self.method.linear(self._operands(dtype), m, x), bias)

    def _fused(self, x: Tensor, m: Tensor, bias: Any) -> Tensor | None:
        """`linear` by a kernel, which reads the prepared tensors in their own dtype and adds the bias at the end; None
        where plain torch has to run."""
        low = self.method.low_rank(self.p)
        if low is None or not low.down.dim() == low.up.dim() == len(m.shape) == 2:
            return None
        inside = bias if isinstance(bias, Tensor) and bias.shape == m.shape[:1] else None
        y = fused_linear(x, m, low.down, low.up, low.scale, c=low.gain, bias=inside, dropout=low.dropout)
        return y if y is None or inside is not None else plus(y, bias)

    def _operands(self, dtype: torch.dtype) -> dict[str, Any]:
        """p in the dtype in which a product runs."""
        if dtype == torch.float32 and self.w.dtype != torch.float64:  # prepared in it already
            return self.p
        return _cast(self.p, dtype)

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
    def _call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], AdaptedWeight):
            args[0]._refuse_write(getattr(func, "__name__", ""))
        return func(*dense(args), **dense(kwargs))

    def _attribute(self, name: str) -> Any:
        self._refuse_write(name)
        return getattr(self.dense(), name)

    def _refuse_write(self, function: str) -> None:
        if function.endswith("_") and not function.endswith("__"):
            raise RuntimeError(
                f"{self.name}: {function} would write to the adapted weight, which is computed anew each time, so the "
                "write would be lost. Write to the base's parameter, or to the adapter's tensors"
            )

    def __getitem__(self, index: Any) -> Any:
        if self.entry.site.stacked and _picks_one(index):
            return _Expert(self, index)
        return self.dense()[dense(index)]

    def __repr__(self) -> str:
        return f"AdaptedWeight({self.name} {list(self.w.shape)}, {self.method})"


class _Expert(AdaptedWeight):
    """One expert's matrix of an adapted stack: `weight[e]`."""

    __slots__ = ()

    def __init__(self, stack: AdaptedWeight, index: Any):
        p = _pick(stack.p, stack.entry.common, index)
        super().__init__(stack.entry, stack.method, p, stack.w[index])

    def canonical(self) -> Tensor:
        return self.w.mT if self.entry.site.kind == "stack_t" else self.w

    def dense(self) -> Tensor:
        return self._matrix().mT if self.entry.site.kind == "stack_t" else self._matrix()

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[dense(index)]


def _pick(p: dict[str, Any], common: frozenset[str], index: Any) -> dict[str, Any]:
    return {
        k: _pick(v, common, index) if isinstance(v, dict) else (v if k in common or k == "scale" else v[index])
        for k, v in p.items()
    }


def _picks_one(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())


def _check(args: Any, kwargs: Any) -> None:
    """Raise where reading the weight now would give a wrong value or a wrong gradient."""
    now, inside = backward_task(), in_function()
    for v in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(v, Slot):
            if v.task != now:
                raise RuntimeError(OUTLIVED.format(name=v.name))
            if inside and not v.inside:
                raise RuntimeError(
                    f"{v.name}: passed to a torch.autograd.Function, which hides its gradient from the adapter (so "
                    "does torch.utils.checkpoint with use_reentrant=True). Call the model on merged parameters, "
                    "torch.func.functional_call(model, net.merge(adapter), …): they are ordinary tensors, "
                    "differentiable in the adapter; for checkpointing, use gradient_checkpointing_enable()."
                )


def dense(tree: Any) -> Any:
    """Nested arguments with every adapted weight in them made dense."""
    if isinstance(tree, AdaptedWeight):
        return tree.dense()
    if type(tree) is dict:
        return {k: dense(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(dense(v) for v in tree)
    return tree


def _cast(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """p with its floating tensors in `dtype`; p itself if they are."""
    for v in p.values():
        if isinstance(v, dict) or v.dtype != dtype:
            break
    else:
        return p
    return {
        k: _cast(v, dtype) if isinstance(v, dict) else v.to(dtype) if v.is_floating_point() else v for k, v in p.items()
    }


def _operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x runs: x's own, or autocast's."""
    if x.dtype != torch.float64 and autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def plus(y: Tensor, bias: Any) -> Tensor:
    return y if bias is None else bias.added_to(y) if isinstance(bias, Slot) else y + bias.to(y.dtype)


def _is(weight: Any, x: Any, kinds: frozenset[str]) -> bool:
    return isinstance(weight, Slot) and weight.multiplies and weight.entry.site.kind in kinds and isinstance(x, Tensor)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if _is(weight, x, _ROWS):
        return weight.linear(x, bias)
    return NotImplemented if isinstance(weight, Slot) else bias.added_to(F.linear(x, weight))


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    """transformers' Conv1D: bias + x @ weight, weight [in, out], x flattened to two dimensions."""
    if beta != 1 or alpha != 1 or out is not None or isinstance(x, Slot):
        return NotImplemented
    if _is(weight, x, _COLUMNS):
        return weight.linear(weight.rowed(x), bias).reshape(x.shape[0], weight.shape[-1])
    if isinstance(weight, Slot) or bias.dim() != 1:
        return NotImplemented
    return bias.added_to(bias.rowed(torch.mm(x, weight))).reshape(x.shape[0], weight.shape[-1])


def _matmul(x: Any, weight: Any) -> Any:
    return weight.linear(x) if _is(weight, x, _COLUMNS) else NotImplemented


_ROWS = LINEAR & {"linear", "stack"}  # kinds whose own orientation is [out, in] …
_COLUMNS = LINEAR - _ROWS  # … and [in, out]


def _embedding(
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not _is(weight, ids, frozenset({"embedding"})) or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    y = weight.product(ids, lambda ids, m: F.embedding(ids, m.mT))  # no sparse gradient: the weight is no leaf
    if padding_idx is None:
        return y
    padding = ids == (padding_idx if padding_idx >= 0 else len(weight) + padding_idx)
    return torch.where(padding[..., None], y.detach(), y)  # the padding row gets no gradient


def _conv(conv: Any, dims: int) -> Callable[..., Any]:
    def product(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        channels = -(dims + 1)
        if not isinstance(weight, Slot) and isinstance(bias, Slot):
            y = conv(x, weight, None, stride, padding, dilation, groups)
            return bias.added_to(y.movedim(channels, -1)).movedim(-1, channels)
        if not _is(weight, x, frozenset({"conv"})) or groups != 1:
            return NotImplemented
        window = weight.entry.site.shape[1:]

        def dot(x: Tensor, m: Tensor) -> Tensor:
            return conv(x, m.reshape(-1, *window), None, stride, padding, dilation).movedim(channels, -1)

        return plus(weight.product(x, dot), bias).movedim(-1, channels)

    return product


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: _conv(F.conv1d, 1),
    F.conv2d: _conv(F.conv2d, 2),
    F.conv3d: _conv(F.conv3d, 3),
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    operator.matmul: _matmul,
}
