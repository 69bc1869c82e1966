"""What stands in a parameter's slot during a call, and where torch's functions on it go.

`PRODUCTS` is the table of functions that have a form of their own: linear layers, embeddings, convolutions, in each
orientation. Every other function sees the dense value, so an adapter can be slow somewhere but never dropped.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import LINEAR
from peftfn.core.plan import WeightEntry
from peftfn.tensors.lent import LOST
from peftfn.tensors.operand import Operand
from peftfn.tensors.transform import autocast, backward_task, in_function

OUTLIVED = (
    "{name}: used after its call was over. torch.utils.checkpoint recomputes during backward, when the tensors of the "
    "call have left the model: turn checkpointing on with the model's gradient_checkpointing_enable(), which peftfn "
    "follows, give the model's own torch.utils.checkpoint use_reentrant=False and context_fn=net.checkpoint_context, "
    "or wrap the whole of net.apply in torch.utils.checkpoint."
)
FIXED = "no forward can give to another layer: tie the weights when the model is made, or leave this site out"


class Slot(Operand):
    """An operand in a parameter's slot, with the parameter's metadata.

    task: the backward pass in which the call runs (−1: none). A recomputation that belongs to another call comes in
    another one, and must not read this call's weights. inside: made inside an autograd.Function's forward, where
    nothing is recorded, so there is no gradient to lose. held: the slots of the layer, for `forward`.
    """

    __slots__ = ("__weakref__", "entry", "held", "task", "w")  # RNNs keep weak references to their weights
    task: int
    multiplies = True  # has `linear` and `product`
    by_itself = True  # all that it computes with are its own tensors
    inside: bool = False
    entry: WeightEntry
    w: Tensor
    held: Mapping[str, Any]
    shape = property(lambda self: self.w.shape)
    dtype = property(lambda self: self.w.dtype)
    device = property(lambda self: self.w.device)

    @property
    def name(self) -> str:
        return self.entry.site.name

    def mapped(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> "Slot":
        """The same with f of each tensor in it. made: what the slots of a layer share, by identity of the original."""
        raise NotImplementedError

    def canonical(self) -> Tensor:
        m = self.entry.to_matrix
        return self.w if m is None else m(self.w)

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        """x [..., in] (w + delta)ᵀ + bias → [..., out], the bias as it stands in the layer's slot."""
        raise NotImplementedError

    def product(self, x: Tensor, dot: Any) -> Tensor:
        """dot(x, w + delta) for an input that is no feature vector: an embedding lookup, a convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The fast lane: the whole forward of a layer that is torch's or transformers' own linear layer."""
        if self.task != backward_task() or (not self.inside and in_function()):
            check((self,), None)
        bias = self.held["bias"]
        return self.linear(x, bias) if isinstance(x, Tensor) else F.linear(x, self, bias)  # which says what is wrong

    @property
    def data(self) -> Any:
        return self.__getattr__("data")

    @data.setter
    def data(self, value: Any) -> None:
        raise RuntimeError(LOST.format(name=self.name))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(LOST.format(name=self.name))

    # Every reading of the value passes `check`: here, in `__torch_function__`, or in an operator.

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling():
            check(args, kwargs)
        product = PRODUCTS.get(func)
        out = NotImplemented if product is None else product(*args, **(kwargs or {}))
        return cls.call(func, args, kwargs or {}) if out is NotImplemented else out

    def __getattr__(self, name: str) -> Any:
        if name == "__qualname__":  # what torch calls this where it refuses it as a parameter
            return f"{type(self).__name__} at {self.name}, which {FIXED}"
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        if not torch.compiler.is_compiling():
            check((self,), None)
        return self.attribute(name)

    def __getitem__(self, index: Any) -> Any:
        if not torch.compiler.is_compiling():
            check((self,), None)
        return self.item_at(index)

    def item_at(self, index: Any) -> Any:
        """self[index]."""
        raise NotImplementedError


def check(args: Any, kwargs: Any) -> None:
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


def plus(y: Tensor, bias: Any) -> Tensor:
    """y and what stands in the slot of a bias."""
    if bias is None:
        return y
    if isinstance(bias, Slot):
        return bias.added_to(y)
    return y + (bias if bias.dtype is y.dtype else bias.to(y.dtype))


def _is(weight: Any, x: Any, kinds: frozenset[str]) -> bool:
    return isinstance(weight, Slot) and weight.multiplies and weight.entry.site.kind in kinds and isinstance(x, Tensor)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if _is(weight, x, _ROWS):
        return weight.linear(x, bias)
    return NotImplemented if isinstance(weight, Slot) else bias.added_to(F.linear(x, weight), x)


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    """transformers' Conv1D: bias + x @ weight, weight [in, out], x flattened to two dimensions."""
    if beta != 1 or alpha != 1 or out is not None or isinstance(x, Slot):
        return NotImplemented
    if _is(weight, x, _COLUMNS):
        return weight.linear(weight.rowed(x), bias).reshape(x.shape[0], weight.shape[-1])
    if isinstance(weight, Slot) or bias.dim() != 1:
        return NotImplemented
    return bias.added_to(bias.rowed(torch.mm(x, weight)), x).reshape(x.shape[0], weight.shape[-1])


def _matmul(x: Any, weight: Any, *, out: Any = None) -> Any:
    return weight.linear(x) if out is None and _is(weight, x, _COLUMNS) else NotImplemented


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
            x = x.to(m.dtype) if autocast(x) else x  # torch's autocast leaves a convolution alone under vmap
            return conv(x, m.reshape(-1, *window), None, stride, padding, dilation).movedim(channels, -1)

        return plus(weight.product(x, dot), bias).movedim(-1, channels)

    return product


PRODUCTS: dict[Any, Callable[..., Any]] = {
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
