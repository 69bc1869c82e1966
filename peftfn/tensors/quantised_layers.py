"""The kinds of quantised layer. A new one is a class here, with `recognises`, `times` and `matrix`, and its place in
`KINDS`, whose first that recognises a layer has it.

A layer is read at each use and never written to: bitsandbytes' own forward moves statistics from the weight into the
layer, and repacks the weight on some CPUs, so it runs on values that are the call's own.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from peftfn.tensors.lent import beneath
from peftfn.tensors.quantised_weight import QuantisedWeight


class TensorWeight(QuantisedWeight):
    """The weight is a tensor of a class of its own, which `F.linear` knows: torchao, quanto."""

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        w = layer._parameters.get("weight")
        return isinstance(w, Tensor) and _dequantise(w) is not None

    @property
    def own_forward(self) -> bool:  # type: ignore[override]
        return isinstance(self.layer, nn.Linear) and _is_a(self.layer, "QModuleMixin")  # quanto quantises others' anew

    @property
    def tensor(self) -> Any:
        return self.layer._parameters["weight"]

    def stored_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def times(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tensor)

    def matrix(self) -> Tensor:
        w = self.tensor
        make = _dequantise(w)
        return w if make is None else make()

    def requantise(self, w: Tensor) -> Tensor:
        old = self.tensor
        if type(old).__name__ != "Int8Tensor" or old.act_pre_scale is not None or old.act_quant_scale is not None:
            return super().requantise(w)
        from torchao.quantization import PerRow, PerTensor

        rows, columns = old.block_size
        if columns != w.shape[1] or rows not in (1, w.shape[0]):
            return super().requantise(w)
        new = type(old).from_hp(
            w.to(old.dtype),
            PerRow() if rows == 1 else PerTensor(),
            act_quant_kwargs=old.act_quant_kwargs,
            reduce_range=old.reduce_range,
        )
        return nn.Parameter(new, requires_grad=False)


def _dequantise(w: Any) -> Callable[[], Tensor] | None:
    """The function of the tensor's own class that makes it dense."""
    own = getattr(type(w), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    return getattr(w, "get_original_weight", None) or (w.dequantize if own else None)


def _is_a(value: Any, name: str) -> bool:
    """Whether it is of a class of this name; asked so, because the library may not be installed."""
    return any(c.__name__ == name for c in type(value).__mro__)


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


class Bnb4Weight(QuantisedWeight):
    """bitsandbytes' `Linear4bit`."""

    parameter, own_forward = "Params4bit", True

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        w = layer._parameters.get("weight")
        return _is_a(w, cls.parameter) or (w is not None and not w.is_floating_point() and _is_a(layer, "Linear4bit"))

    @staticmethod
    def share(p: Any) -> nn.Parameter:
        new: Any = copy.copy(p)
        new.quant_state, new.module = copy.deepcopy(p.quant_state, {id(t): t for t in _states([p.quant_state])}), None
        return new.requires_grad_(False)  # type: ignore[no-any-return]

    @property
    def packed(self) -> Any:
        return self.layer._parameters["weight"]

    @property
    def state(self) -> Any:
        """How it is quantised: known to the parameter, or where FSDP2 has made another of it, to the layer."""
        return getattr(self.packed, "quant_state", None) or getattr(self.layer, "quant_state", None)

    def problem(self) -> str | None:
        if self.state is None:
            return "the layer is not quantised yet; move the model to its device first, model.to(…)"
        return None

    def stored_dtype(self) -> torch.dtype:
        state = self.state
        return getattr(state, "original_dtype", state.dtype)

    def times(self, x: Tensor) -> Tensor:
        given = self.layer.compute_dtype if self.layer.compute_type_is_set else None
        dtype = given or (torch.float32 if x.dtype == torch.float64 else x.dtype)  # its kernels misread fp64
        y: Tensor = _bitsandbytes().matmul_4bit(x.to(dtype), self.packed, quant_state=self.state)
        return y.to(x.dtype)

    def matrix(self) -> Tensor:
        state = self.state
        if getattr(state, "packing_format_for_cpu", False):  # no function reads that layout but the product
            return _by_identity(self, state.dtype)
        w: Tensor = _bitsandbytes().functional.dequantize_4bit(self.packed.data, state)
        return w

    def requantise(self, w: Tensor) -> Tensor:
        old = self.packed
        new = type(old)(
            w.to(self.stored_dtype()),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        return new.to(old.device)


class Bnb8Weight(QuantisedWeight):
    """bitsandbytes' `Linear8bitLt`, which also rounds its input to eight bits, except in train mode on a CPU."""

    parameter, own_forward = "Int8Params", True

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        return _is_a(layer._parameters.get("weight"), cls.parameter)

    @staticmethod
    def share(p: Any) -> nn.Parameter:
        new: nn.Parameter = type(p)(p.data, False, p.has_fp16_weights, p.CB, p.SCB)
        return new

    @property
    def packed(self) -> Any:
        return self.layer._parameters["weight"]

    def problem(self) -> str | None:
        if self.layer.state.has_fp16_weights:
            return "it quantises its weight anew at each call; make it with has_fp16_weights=False"
        if self.packed.dtype != torch.int8:
            return "the layer is not quantised yet; move the model to its device first, model.to(…)"
        return None

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """The integers [out, in], and the largest absolute value of each row [out]."""
        held = self.packed if self.packed.SCB is not None else self.layer.state  # the layer's own forward moves them
        return self.packed.data, held.SCB

    def times(self, x: Tensor) -> Tensor:
        bnb, old = _bitsandbytes(), self.layer.state
        state = bnb.MatmulLtState()
        state.CB, state.SCB = self._statistics()
        state.threshold, state.use_pool, state.has_fp16_weights = old.threshold, old.use_pool, False
        state.is_training = self.layer.training
        return bnb.matmul(x, self.packed, state=state)

    def matrix(self) -> Tensor:
        q, absmax = self._statistics()
        return q * (absmax[:, None] / 127)

    def requantise(self, w: Tensor) -> Tensor:
        new = type(self.packed)(w.cpu(), requires_grad=False, has_fp16_weights=False)
        return new.to(self.packed.device)


def held(module: nn.Module) -> list[Tensor]:
    """The tensors that a quantised layer keeps in objects of its own (bitsandbytes' states), for copies to share."""
    return _states([v for v in vars(module).values() if _is_state(v)])


def _states(states: list[Any]) -> list[Tensor]:
    out: list[Tensor] = []
    while states:
        values = vars(states.pop()).values()
        out += [v for v in values if isinstance(v, Tensor)]
        states += [v for v in values if _is_state(v)]
    return out


def _is_state(v: Any) -> bool:
    return _of_bitsandbytes(v.__class__) and hasattr(v, "__dict__") and not isinstance(v, Tensor)


@functools.lru_cache(1024)
def _of_bitsandbytes(kind: type) -> bool:
    return kind.__module__.startswith("bitsandbytes")


class LayerWeight(QuantisedWeight):
    """Any other layer that says its `in_features` and `out_features` and shows no matrix: GPTQ, AWQ, HQQ, AQLM …"""

    own_forward = True

    @classmethod
    def recognises(cls, layer: nn.Module) -> bool:
        if features(layer) is None or hasattr(layer, "parametrizations") or any(layer.children()):
            return False
        own = [t for d in (layer._parameters, layer._buffers) for t in d.values() if t is not None]
        return any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in own)

    def times(self, x: Tensor) -> Tensor:
        layer = object.__new__(type(self.layer))  # a copy that shares all tensors but has no bias
        vars(layer).update(vars(self.layer))
        vars(layer).pop("bias", None)
        vars(layer)["_buffers"] = {k: t for k, t in self.layer._buffers.items() if k != "bias"}
        vars(layer)["_parameters"] = {**self.layer._parameters, "bias": None}
        return type(layer).forward(layer, x)

    def times_transposed(self, g: Tensor) -> Tensor:
        with torch.enable_grad():  # by the layer's own backward, where it has one
            x = g.new_zeros(len(g), self.shape[1], requires_grad=True)
            y = self.times(x)
            if y.requires_grad:
                return torch.autograd.grad(y, x, g.to(y.dtype))[0]
        return super().times_transposed(g)

    def matrix(self) -> Tensor:
        own = getattr(type(self.layer), "dequantize", None)  # HQQ has it
        w = own(self.layer) if own is not None else None
        return w if isinstance(w, Tensor) and w.shape == self.shape else _by_identity(self, self.dtype)


def _by_identity(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """W from the layer's product with the identity; a row of zeros tells what else the layer adds."""
    n = weight.shape[1]
    with beneath():  # a kernel may have no form under a transform, and W depends on none
        y = weight.times(torch.eye(n + 1, n, dtype=dtype, device=weight.device))
        return (y[:-1] - y[-1]).mT


KINDS: list[type[QuantisedWeight]] = [Bnb4Weight, Bnb8Weight, TensorWeight, LayerWeight]


def features(module: nn.Module) -> Size | None:
    """[out, in] of a layer that says so."""
    for out, in_ in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        if out not in vars(module) and not hasattr(type(module), out):  # a module without it takes long to say so
            continue
        sizes = getattr(module, out, None), getattr(module, in_, None)
        if all(isinstance(n, int) for n in sizes):
            return Size(sizes)  # type: ignore[arg-type]
    return None
