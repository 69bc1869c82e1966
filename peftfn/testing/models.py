"""The smallest model of every kind of site, all with a canonical weight of [6, 8], so that one case fits them all."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUT, IN, EXPERTS = 6, 8, 2


class Conv1D(nn.Module):
    """transformers' transposed linear layer."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 3), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """A stack of experts, every one run on every row, picked one by one like in transformers' eager form."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        shape = (EXPERTS, IN, OUT) if is_transposed else (EXPERTS, OUT, IN)
        self.weight = nn.Parameter(torch.randn(shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_transposed:
            return torch.stack([x @ self.weight[e] for e in range(EXPERTS)], -1)
        return torch.stack([F.linear(x, self.weight[e]) for e in range(EXPERTS)], -1)


class Sliced(nn.Module):
    """A weight that no product table knows: it must be seen dense."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Attention(nn.Module):
    """Attention as Llama has it: called by keyword, with positions; it returns a tuple."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(IN, IN), nn.Linear(IN, self.head_dim)
        self.v_proj, self.o_proj = nn.Linear(IN, self.head_dim), nn.Linear(IN, IN, bias=False)

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        y = torch.softmax(q @ k[..., None, :, :].mT / 2, -1) @ v[..., None, :, :]
        return self.o_proj(y.transpose(-3, -2).flatten(-2)), None


class Block(nn.Module):
    """A block as Llama has it: called with positions, with residual connections around `Attention` and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.down_proj = Attention(), nn.Linear(IN, IN)

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None) -> Tensor:
        x = hidden_states + self.self_attn(hidden_states, position_embeddings=position_embeddings)[0]
        return x + self.down_proj(x).tanh()


def positional(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of one tensor."""
    out: Tensor = layer(x)
    return out


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer like `Attention`."""
    angles = torch.linspace(0, 1, x.shape[-2] * 4, dtype=x.dtype).view(1, x.shape[-2], 4)
    out: Tensor = layer(hidden_states=x, position_embeddings=(angles.cos(), angles.sin()))[0]
    return out


def placed(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer like `Block`."""
    angles = torch.linspace(0, 1, x.shape[-2] * 4, dtype=x.dtype).view(1, x.shape[-2], 4)
    out: Tensor = layer(x, position_embeddings=(angles.cos(), angles.sin()))
    return out


@dataclass(frozen=True)
class Model:
    """kind: of its interesting site `layer.weight`, or `layer` where it is a module; rowed: whether mixed batches keep
    their rows there; more: layers beside it, with the same input, whose outputs are added to its own; tied: all have
    one weight; call: how the layers are called; wide: whether an fp64 model computes in fp64 throughout."""

    kind: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Tensor]
    rowed: bool = True
    more: tuple[Callable[[], nn.Module], ...] = ()
    tied: bool = False
    call: Callable[[nn.Module, Tensor], Tensor] = positional
    wide: bool = True
    root: Callable[..., nn.Module] = lambda *args: _Wrap(*args)

    def build(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = self.root(self.layer(), [layer() for layer in self.more], self.tied, self.call)
            return wrapped.to(dtype).eval()

    def x(self, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return self.inputs(rows, dtype)


class _Wrap(nn.Module):
    def __init__(
        self, layer: nn.Module, more: list[nn.Module], tied: bool, call: Callable[[nn.Module, Tensor], Tensor]
    ):
        super().__init__()
        self.layer, self.call = layer, call
        if more:
            self.more = nn.ModuleList(more)
        for other in more if tied else ():
            other.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.call(self.layer, x)
        for layer in getattr(self, "more", ()):
            out = (
                out + self.call(layer, x)[..., : out.shape[-1]]
            )  # a sum, so that gates of outputs are gates of the layers'
        return out


class _OfIds(_Wrap):
    """A model of token ids: a table, which is no parameter, has the layers' input for each."""

    table: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("table", torch.randn(IN, IN))

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(self.table[input_ids])


class _Backbone(_Wrap):
    """A backbone of one layer: it embeds tokens, and has a module before the layer, `stem`."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.embed, self.stem = nn.Embedding(IN, IN), nn.Linear(IN, OUT)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.stem(x) + super().forward(x)


def twice(model: nn.Module, mode: Callable[[], AbstractContextManager[Any]]) -> nn.Module:
    """One of these models, which uses its layers in `mode` first, for nothing, and then as usual."""
    out = copy.copy(model)
    out.__class__ = _twice_class(type(model))  # type: ignore[arg-type]
    out.mode = mode  # type: ignore[assignment]
    return out.eval()


@cache
def _twice_class(cls: Any) -> Any:
    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.mode():
            cls.forward(self, *args, **kwargs)
        return cls.forward(self, *args, **kwargs)

    return type(f"Twice{cls.__name__}", (cls,), {"forward": forward})


def _features(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, 3, IN, dtype=dtype)


def _ids(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, IN, (rows, 3))


def _sentences(rows: int, dtype: torch.dtype) -> Tensor:
    """In which the tokens 3 4, and the token 5, come early, late, twice, and never."""
    some = torch.tensor([[3, 4, 5], [5, 3, 4], [1, 2, 0], [2, 5, 1], [3, 4, 3], [5, 0, 5]])
    return some[torch.arange(rows) % len(some)]


def of_ids(model: "Model") -> "Model":
    """The same kind of site in a model of token ids, for methods that act on some tokens alone."""
    if model.inputs is _ids:
        return replace(model, inputs=_sentences)
    return replace(model, inputs=_sentences, root=_OfIds) if model.inputs is _features else model


def _image(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, 2, 5, 4, dtype=dtype)


def _signal(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, 4, 7, dtype=dtype)


MODELS = {
    "linear": Model("linear", lambda: nn.Linear(IN, OUT), _features),
    "linear, no bias": Model("linear", lambda: nn.Linear(IN, OUT, bias=False), _features),
    "dense": Model("linear", Sliced, _features),
    "linear_t": Model("linear_t", lambda: Conv1D(OUT, IN), _features),
    "embedding": Model("embedding", lambda: nn.Embedding(IN, OUT), _ids),
    "conv1d": Model("conv", lambda: nn.Conv1d(4, OUT, 2, stride=2, dilation=2), _signal),
    "conv2d": Model("conv", lambda: nn.Conv2d(2, OUT, 2, padding=1, padding_mode="circular"), _image),
    "conv2d, grouped": Model(
        "conv", lambda: nn.Conv2d(4, OUT, 2, groups=2), lambda n, d: torch.randn(n, 4, 5, 4, dtype=d)
    ),
    "conv_t": Model("conv_t", lambda: nn.ConvTranspose2d(2, OUT, 2), _image),
    "stack": Model("stack", lambda: Experts(False), _features, rowed=False),
    "stack_t": Model("stack_t", lambda: Experts(True), _features, rowed=False),
    "other": Model("other", lambda: nn.LayerNorm(IN), _features),
}
"""name → model; names that share a kind differ in the path a call takes."""


def _linears(bias: bool, *sizes: int) -> Model:
    layers = [lambda n=n: nn.Linear(IN, n, bias=bias) for n in (OUT, *sizes)]  # type: ignore[misc]
    return Model("linear", layers[0], _features, more=tuple(layers[1:]))


def _twice(name: str, tied: bool = False) -> Model:
    return replace(MODELS[name], more=(MODELS[name].layer,), tied=tied)


def _llama() -> nn.Module:
    """Without a padding token: torch gives its row of a table no gradient, though outputs depend on it."""
    import transformers as tf

    sizes: Any = {"hidden_size": IN, "intermediate_size": IN, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": IN, "num_key_value_heads": 1, "attn_implementation": "eager"}
    return tf.LlamaModel(tf.LlamaConfig(**sizes))


def embedded(layer: nn.Module, x: Tensor) -> Tensor:
    """A backbone of transformers': the hidden states of its own tokens."""
    out: Tensor = layer(input_ids=x).last_hidden_state[:, -x.shape[1] :]
    return out


INPUTS = {"backbone": Model("tokens", _llama, _ids, call=embedded, wide=False)}
"""Those whose site is a backbone, for methods on its inputs. They need transformers."""
AROUND = {
    "module": Model("module", lambda: nn.Linear(IN, OUT), _features),
    "module, attention": Model("module", Attention, _features, call=attended),
    "module, block": Model("module", Block, _features, call=placed),
    "module, in a backbone": Model("module", lambda: nn.Linear(IN, OUT), _ids, root=_Backbone),
    "module, of ids": Model("module", lambda: nn.Embedding(IN, OUT), _ids),
}
"""Those whose site is a module, for methods around a forward."""
SEVERAL = {
    "linear, several": _linears(True, OUT, OUT + 2),
    "linear, no bias, several": _linears(False, OUT, OUT + 2),
    "embedding, several": _twice("embedding"),
    "conv2d, several": _twice("conv2d"),
    "stack, several": _twice("stack"),
    "module, several": replace(AROUND["module"], more=(lambda: nn.Linear(IN, OUT),)),
}
"""Models with several sites, for methods whose sites share tensors (`shared`, `bank`)."""
ALIKE = {
    "linear, alike": _linears(True, OUT),
    "linear, no bias, alike": _linears(False, OUT),
    "embedding, tied": _twice("embedding", tied=True),
}
"""Those for methods that want the sites that share to be alike: of one shape, or of one weight."""
