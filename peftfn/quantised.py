"""Quantised layers: a value that stands for the weight of a layer whose weight cannot be read as a matrix.

Such a layer is known by what it does: x ↦ x Wᵀ, with its own kernel. A `QuantisedWeight` takes W's place in a method's
formulas. `F.linear(x, weight)` runs the layer's kernel, and every other function sees W dequantised, which each kind
knows how to do; where it knows nothing better, it sends the identity matrix through the layer. So additive methods
(LoRA, VeRA …) never touch W, and those that compute with W (DoRA's norms, PiSSA's factors) still mean what they say.

The layer of the base is read at each use and never written to: bitsandbytes' own forward moves statistics from the
weight into the layer, and repacks the weight on some CPUs, so it runs on values that are the call's own.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter


def quantised(module: nn.Module, name: str = "weight") -> "QuantisedWeight | None":
    """What stands for the weight of `module`, named `name` in errors; None for a layer whose weight is a matrix."""
    w: Any = module._parameters.get("weight")
    if isinstance(w, UninitializedParameter) or (
        type(w) is nn.Parameter and w.is_floating_point() and w.dtype.itemsize > 1
    ):
        return None
    known = _KINDS.get(type(w).__name__)
    if known is None and isinstance(w, Tensor) and _dequantise(w) is not None:
        known = _TensorWeight
    shape = _features(module)
    if known is not None:
        return known(module, name, w.shape if shape is None else shape) if known.takes(module) else None
    if shape is None or hasattr(module, "parametrizations") or any(module.children()):
        return None
    own = [t for d in (module._parameters, module._buffers) for t in d.values() if t is not None]
    codes = any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in own)
    return _LayerWeight(module, name, shape) if codes else None


def parameters(model: nn.Module) -> dict[str, Any]:
    """The model's parameters as they are now, every name of each, as constants; quantised weights by what stands for
    them, and the bias of such a layer also where it is a buffer."""
    out: dict[str, Any] = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    for name, w in weights(model):
        out[name] = w
        bias = w.bias()
        if bias is not None:
            out.setdefault(name.removesuffix("weight") + "bias", bias.detach())
    return out


def weights(model: nn.Module) -> Iterator[tuple[str, "QuantisedWeight"]]:
    """(name, weight) of every quantised layer, every name of each."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = f"{prefix}.weight" if prefix else "weight"
        if (w := quantised(module, name)) is not None:
            yield name, w


class Parts(Mapping[str, Any]):
    """A quantised layer's weight and bias, as a dict that is read anew each time."""

    def __init__(self, weight: "QuantisedWeight"):
        self.weight = weight

    def __getitem__(self, key: str) -> Any:
        return self.weight if key == "weight" else self.weight.bias()

    def __iter__(self) -> Iterator[str]:
        return iter(("weight", "bias"))

    def __len__(self) -> int:
        return 2


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
    return type(v).__module__.startswith("bitsandbytes") and hasattr(v, "__dict__") and not isinstance(v, Tensor)


def share(p: Any) -> nn.Parameter:
    """A parameter of one's own that shares p's storage and does not require gradients, with what p knows of itself."""
    if type(p).__name__ == "Params4bit":
        new = copy.copy(p)
        new.quant_state, new.module = copy.deepcopy(p.quant_state, {id(t): t for t in _states([p.quant_state])}), None
    elif type(p).__name__ == "Int8Params":
        new = type(p)(p.data, requires_grad=False, has_fp16_weights=p.has_fp16_weights, CB=p.CB, SCB=p.SCB)
    else:
        new = nn.Parameter(p.detach(), requires_grad=False)
    return new.requires_grad_(False)


class Reader:
    """original ↦ what stands for a layer's weight, for a layer that is parametrized there.

    Such a layer has its weight in the parametrization and another class, so we look at a copy that has neither.
    """

    def __init__(self, layer: nn.Module, cls: type[nn.Module], name: str):
        self.layer, self.cls, self.name = layer, cls, name

    def __call__(self, original: Tensor) -> "QuantisedWeight":
        bare: nn.Module = object.__new__(self.cls)
        vars(bare).update(vars(self.layer))
        vars(bare).pop("forward", None)
        weight = {"weight": original} if original.numel() else {}
        vars(bare)["_parameters"] = {**self.layer._parameters, **weight}
        vars(bare)["_modules"] = {k: m for k, m in self.layer._modules.items() if k != "parametrizations"}
        found = quantised(bare, self.name)
        assert found is not None
        return found


class QuantisedWeight:
    """W [out, in] of a layer, as an operand: `F.linear` runs the layer, everything else sees W dequantised."""

    own_forward: ClassVar[bool] = False
    """Whether the layer has a forward of its own instead of calling `F.linear` on its weight."""
    layout, is_sparse, is_quantized, is_nested, requires_grad = torch.strided, False, False, False, False

    def __init__(self, layer: nn.Module, name: str, shape: Size, dtype: torch.dtype | None = None):
        self.layer: Any = layer
        self.name, self.shape, self._dtype = name, shape, dtype

    # What each kind knows of itself.

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether the layer is a matrix product (an embedding of quantised rows is not)."""
        return not isinstance(module, nn.Embedding | nn.EmbeddingBag)

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
            with torch.no_grad():
                return self.matrix().to(self.dtype)
        except Exception as e:
            raise ValueError(
                f"{self.name}: {type(self.layer).__name__} cannot be dequantised here ({type(e).__name__}: {e}), and "
                "something asks for the weight itself. Choose a method that only adds to the layer's output, like "
                "LoRA, or dequantise the model first."
            ) from e

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or self.stored_dtype()

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    ndim = property(lambda self: 2)
    is_meta = property(lambda self: self.device.type == "meta")
    is_cuda = property(lambda self: self.device.type == "cuda")

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

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
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) == 2 and isinstance(args[0], Tensor):
            return args[1].linear(args[0])
        if func in _LIKE:  # W's values do not matter
            return _LIKE[func](args[0].shape, **{"dtype": args[0].dtype, "device": args[0].device, **(kwargs or {})})
        return func(*_dense(args), **_dense(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name} {list(self.shape)}, {type(self.layer).__name__})"


def _operators() -> None:
    def make(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
        def operate(self: QuantisedWeight, *others: Any) -> Any:
            return function(*others, self.dense()) if reflected else function(self.dense(), *others)

        return operate

    for name in ["add", "sub", "mul", "truediv", "matmul", "pow"]:
        setattr(QuantisedWeight, f"__{name}__", make(getattr(operator, name), False))
        setattr(QuantisedWeight, f"__r{name}__", make(getattr(operator, name), True))
    setattr(QuantisedWeight, "__neg__", make(operator.neg, False))  # noqa: B010


_operators()


_LIKE: dict[Any, Any] = {torch.empty_like: torch.empty, torch.zeros_like: torch.zeros, torch.ones_like: torch.ones}


def _dense(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _dense(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_dense(v) for v in tree)
    return tree.dense() if isinstance(tree, QuantisedWeight) else tree


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


class _TensorWeight(QuantisedWeight):
    """The weight is a tensor of a class of its own, which `F.linear` knows: torchao, quanto."""

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


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


class _Bnb4Weight(QuantisedWeight):
    """bitsandbytes' `Linear4bit`."""

    own_forward = True

    @property
    def packed(self) -> Any:
        return self.layer._parameters["weight"]

    def problem(self) -> str | None:
        if getattr(self.packed, "quant_state", None) is None:
            return "the layer is not quantised yet; move the model to its device first, model.to(…)"
        return None

    def stored_dtype(self) -> torch.dtype:
        state = self.packed.quant_state
        return getattr(state, "original_dtype", state.dtype)

    def times(self, x: Tensor) -> Tensor:
        given = self.layer.compute_dtype if self.layer.compute_type_is_set else None
        dtype = given or (torch.float32 if x.dtype == torch.float64 else x.dtype)  # its kernels misread fp64
        y: Tensor = _bitsandbytes().matmul_4bit(x.to(dtype), self.packed, quant_state=self.packed.quant_state)
        return y.to(x.dtype)

    def matrix(self) -> Tensor:
        state = self.packed.quant_state
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


class _Bnb8Weight(QuantisedWeight):
    """bitsandbytes' `Linear8bitLt`, which also rounds its input to eight bits, except in train mode on a CPU."""

    own_forward = True

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


class _LayerWeight(QuantisedWeight):
    """Any other layer that says its `in_features` and `out_features` and shows no matrix: GPTQ, AWQ, HQQ, AQLM …"""

    own_forward = True

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
        return _by_identity(self, self.dtype)


def _by_identity(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """W from the layer's product with the identity; a row of zeros tells what else the layer adds."""
    n = weight.shape[1]
    y = weight.times(torch.eye(n + 1, n, dtype=dtype, device=weight.device))
    return (y[:-1] - y[-1]).mT


_KINDS: dict[str, type[QuantisedWeight]] = {"Params4bit": _Bnb4Weight, "Int8Params": _Bnb8Weight}


def _features(module: nn.Module) -> Size | None:
    """[out, in] of a layer that says so."""
    for out, in_ in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        if out not in vars(module) and not hasattr(type(module), out):  # a module without it takes long to say so
            continue
        sizes = getattr(module, out, None), getattr(module, in_, None)
        if all(isinstance(n, int) for n in sizes):
            return Size(sizes)  # type: ignore[arg-type]
    return None
