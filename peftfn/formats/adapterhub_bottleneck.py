"""AdapterHub's bottlenecks: serial, parallel, of Kronecker products (Compacter), and AdapterPlus'.

h is what a sub-layer returns, r the residual stream that it began from, x = r + h, and N the norm after it, if any:

    h + U act(D h)           "double_seq_bn" (Houlsby's)
    N(x + U act(D N(x)))     "seq_bn" (Pfeiffer's), where a norm follows; x + U act(D x) where none does
    N(x) + U act(D N(x))     with original_ln_after=False, as AdapterPlus'; x + U act(D x) where no norm follows
    h + U act(D r)           "par_bn" (He's, parallel)
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from peftfn.formats.adapterhub_place import Read
from peftfn.formats.tensor_files import Tensors as File
from peftfn.methods.modules.adapterplus import AdapterPlus
from peftfn.methods.modules.bottleneck import Bottleneck
from peftfn.methods.modules.compacter import Compacter

_PLAIN = {"ln_before": False, "ln_after": False, "use_gating": False, "adapter_residual_before_ln": False}
"""Options that have one value here."""
_PHM = {
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "learn_phm": True,
    "phm_bias": True,
}
"""As `_PLAIN`, of Compacter."""
_LINEAR = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "c",
    "adapter_up.weight": "up",
    "adapter_up.bias": "b",
}
_KRONECKER = {
    "adapter_down.0.W_left": "down_left",
    "adapter_down.0.W_right": "down_right",
    "adapter_down.0.b": "c",
    "adapter_up.W_left": "up_left",
    "adapter_up.W_right": "up_right",
    "adapter_up.b": "b",
}
Of = Literal["output", "input", "normed"]


class Point(NamedTuple):
    """Where adapters stand at one sub-layer of a block: names of modules; "" for none."""

    output: str  # what returns h
    norm: str  # N
    after: str  # what returns x, where no norm follows
    residual: str  # what r goes into

    def serial(self) -> tuple[str, Of, str]:
        """(the site of a bottleneck, of what, its source)"""
        return self.output, "output", ""

    def normed(self) -> tuple[str, Of, str]:
        return (self.norm, "normed", "") if self.norm else (self.after, "output", "")

    def behind(self) -> tuple[str, Of, str]:
        return self.norm or self.after, "output", ""

    def parallel(self) -> tuple[str, Of, str]:
        return self.output, "input", "" if self.residual == self.output else self.residual


def read(r: Read, at: str, tensors: dict[str, Any], file: File, keys: Mapping[str, str]) -> None:
    """One bottleneck, at a path of theirs."""
    phm, scaling = bool(r.config.get("phm_layer", False)), r.config.get("scaling", 1.0)
    channels = scaling == "channel" and not phm
    for option, value in {**_PLAIN, **(_PHM if phm else {}), **({} if channels else {"stochastic_depth": 0.0})}.items():
        r.one(option, value)
    if not channels and not isinstance(scaling, float | int):
        raise ValueError(f"{r.where}: scaling is {scaling!r}; this release reads a number, and 'channel'")
    names = dict(_KRONECKER if phm else _LINEAR) | ({"scaling": "g"} if channels else {})
    if tensors.keys() != names.keys():
        raise ValueError(f"{r.where}: the adapter at {at} has {sorted(tensors)}; this release reads {[*names]}")
    site, of, source = _place(r, at)
    if not site:
        raise ValueError(f"{r.where}: the adapter at {at} stands between residual connections, which has no form here")
    leaf = {ours: tensors[theirs] for theirs, ours in names.items()}
    shape = {ours: file.meta[keys[theirs]].shape for theirs, ours in names.items()}
    drop, act, rank, dim = r.config.get("dropout", 0.0), r.activation(), *(shape[k][0] for k in ("c", "b"))
    if channels:
        if of != "output":
            raise ValueError(f"{r.where}: scaling is 'channel' of {of}; this release reads it of what a module returns")
        r.put(site, AdapterPlus(rank, act, r.config.get("stochastic_depth", 0.0), drop, dim), leaf)
        return
    leaf["b"] = lambda: scaling * tensors["adapter_up.b" if phm else "adapter_up.bias"]()  # they scale the bias too
    more: dict[str, Any] = {"of": of, "scale": float(scaling), "dropout": drop, "dim": dim, "source": source}
    if phm:
        n, _, inner = shape["down_left"]
        r.put(site, Compacter(rank, act, **more, n=n, phm_rank=inner), leaf)
    else:
        r.put(site, Bottleneck(rank, act, **more), leaf)


def share(r: Read, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """What all bottlenecks of the file have in common: Compacter's rule."""
    sites = [m for m in r.methods.values() if isinstance(m, Compacter)]
    if not sites:
        if tensors:
            raise ValueError(f"{r.where}: its bottlenecks share {sorted(tensors)}, which this release does not read")
        return
    if tensors.keys() != {"phm_rule"}:
        raise ValueError(
            f"{r.where}: its layers share a phm_rule, and the file has {sorted(tensors) or 'none'}; the package leaves "
            "it out where the base is the whole model: save it from a model around that (BertForSequenceClassification)"
        )
    if len(set(sites)) > 1:
        raise ValueError(
            f"{r.where}: its layers share a phm_rule, and have several sizes or sources: {sites[0]} is one"
        )
    r.bank = dict(tensors)


# Places.


def _place(r: Read, at: str) -> tuple[str, Of, str]:
    point = _point(r, at)
    if r.config.get("is_parallel", False):
        r.one("original_ln_after", True)
        if not point.residual:
            raise ValueError(f"{r.where}: nothing at {at} is given the residual stream that a parallel adapter reads")
        return point.parallel()
    if not r.config.get("original_ln_before", False):
        r.one("original_ln_after", True)
        return point.serial()
    if r.config.get("original_ln_after", True):
        r.one("residual_before_ln", True)
        return point.normed()
    r.one("residual_before_ln", False)
    return point.behind()


def _point(r: Read, at: str) -> Point:
    above, _, holder = at.rpartition(".")
    if holder in _HELD:
        return _in_block(r, r.module(above), holder)
    path = r.module(at)
    children = dict(r.model.modules[path].named_children())
    if {"layer_norm", "dropout"} <= children.keys():  # T5's: a sub-layer with its residual connection
        return Point(f"{path}.dropout", "", path, f"{path}.layer_norm")
    if not {"dense", "LayerNorm"} <= children.keys():
        raise ValueError(f"{r.where}: {path} has no dense layer with a LayerNorm after it, as BERT's has")
    layer, _, own = path.removesuffix(".output").rpartition(".")  # BERT's: a projection, a dropout and a norm
    own = f"{layer}.attention.self" if own == "attention" else f"{path.removesuffix('.output')}.intermediate.dense"
    output = f"{path}.dropout" if "dropout" in children else f"{path}.dense"
    return Point(output, f"{path}.LayerNorm", "", own if own in r.model.modules else "")


class _Held(NamedTuple):
    """What holds an adapter in a block, by the names that its neighbours have."""

    sublayer: tuple[str, ...]
    norm: str  # after the residual connection (DistilBERT's)
    before: tuple[str, ...]  # the norms before the sub-layer


_HELD = {
    "attention_adapters": _Held(("attn", "self_attn", "attention"), "sa_layer_norm", ("ln_1", "input_layernorm")),
    "output_adapters": _Held(("mlp", "ffn"), "output_layer_norm", ("ln_2", "post_attention_layernorm")),
}


def _in_block(r: Read, block: str, holder: str) -> Point:
    children = dict(r.model.modules[block].named_children())
    held = _HELD[holder]
    follows = next((n for n in held.sublayer if n in children), None)
    if follows is None or "cross_attn" in " ".join(children) or "pre_feedforward_layernorm" in children:
        raise ValueError(f"{r.where}: {block} has no part {' or '.join(held.sublayer)}, or others beside it")
    output = f"{block}.{follows}"
    if isinstance(children.get(held.norm), nn.Module):
        return Point(output, f"{block}.{held.norm}", "", output)
    norm = next((f"{block}.{n}" for n in held.before if n in children), "")
    return Point(output, "", block if holder == "output_adapters" else "", norm)
