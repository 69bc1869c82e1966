"""What a model offers: its sites, their kinds, and how each kind turns into the one orientation methods see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from peftfn.tensors.quantised_weight import QuantisedWeight

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_T = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Site:
    """One parameter or module of the model, as something that can be adapted.

    Example:
        site = pf.sites(torch.nn.Sequential(torch.nn.Linear(8, 4)))["0.weight"]
        assert site.kind == "linear" and site.bias == "0.bias"
    """

    name: str  # "layers.0.q_proj.weight"; of a module "layers.0.mlp"
    kind: str  # see KINDS
    shape: torch.Size  # the parameter's own shape; of a module, [width of its hidden states]
    bias: str | None = None  # the slot that holds this layer's bias, also when it is empty
    aliases: tuple[str, ...] = field(default=(), compare=False)  # other names of the same slot (a shared submodule)
    tied: tuple[str, ...] = field(default=(), compare=False)  # names of other slots that hold the same tensor
    quantised: bool = False  # what stands for the weight is a `QuantisedWeight`

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def label(self) -> str:
        """The name, for messages: the model itself, as a module, has none."""
        return self.name or "the model"

    def canonical(self, w: Tensor) -> Tensor:
        """Turn the parameter w into the one orientation that methods see.

        Returns:
            [out, in], or [e, out, in] for a stack; a view wherever one exists.
        """
        return KINDS[self.kind][0](w)

    def original(self, m: Tensor) -> Tensor:
        """Turn m back from the canonical orientation.

        Returns:
            m in the parameter's own shape.
        """
        return KINDS[self.kind][1](m, self.shape)

    @property
    def stacked(self) -> bool:
        return self.kind in ("stack", "stack_t")

    def matrix_shape(self) -> torch.Size:
        """Tell what a method sees.

        Returns:
            The canonical shape, without the expert axis.
        """
        shape = self.canonical(torch.empty(self.shape, device="meta")).shape
        return shape[1:] if self.stacked else shape


def _same(w: Tensor, shape: torch.Size | None = None) -> Tensor:
    return w


def _turn(w: Tensor, shape: torch.Size | None = None) -> Tensor:
    return w.mT


def _flatten(w: Tensor) -> Tensor:
    return w.flatten(1)


def _unflatten(m: Tensor, shape: torch.Size) -> Tensor:
    return m.reshape(shape)


def _flatten_t(w: Tensor) -> Tensor:
    return w.transpose(0, 1).flatten(1)


def _unflatten_t(m: Tensor, shape: torch.Size) -> Tensor:
    return m.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, torch.Size], Tensor]]] = {
    "linear": (_same, _same),  # [out, in]: nn.Linear, attention in-projections, RNNs, any other 2-D parameter
    "linear_t": (_turn, _turn),  # [in, out]: transformers' Conv1D
    "embedding": (_turn, _turn),  # [vocab, dim]
    "conv": (_flatten, _unflatten),  # [out, in/groups, *kernel]
    "conv_t": (_flatten_t, _unflatten_t),  # [in, out, *kernel], groups = 1
    "stack": (_same, _same),  # [e, out, in]: experts
    "stack_t": (_turn, _turn),  # [e, in, out]: experts stored transposed
    "other": (_same, _same),  # norms, biases, anything else
    "module": (_same, _same),  # a module; what stands for its weight is a `Place`
    "tokens": (_same, _same),  # a backbone, likewise
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' transposed linear layer."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def runs_linear(layer: nn.Module) -> bool:
    """Whether the layer's forward is torch's or transformers' own, and computes x Wᵀ + bias and nothing else."""
    if "forward" in vars(layer):
        return False
    forward: Any = type(layer).forward
    if forward is nn.Linear.forward:
        return True
    return (forward.__qualname__, forward.__module__) == ("Conv1D.forward", "transformers.pytorch_utils")


def _kind(module: nn.Module, p: Tensor) -> str:
    if isinstance(module, _CONV):
        return "conv" if p.dim() > 1 else "other"
    if isinstance(module, _CONV_T):
        return "conv_t" if p.dim() > 1 and module.groups == 1 else "other"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if p.dim() == 2:
        return "linear_t" if is_conv1d(module) else "linear"
    if p.dim() == 3:
        return "stack_t" if getattr(module, "is_transposed", False) else "stack"
    return "other"


def sites_in(
    modules: Mapping[str, nn.Module], stand_ins: Mapping[str, QuantisedWeight], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Site]:
    """Every parameter of the modules as a site, one for each slot, in their order, by its first name.

    modules: every name of each module. stand_ins: what stands for quantised weights, by name. parameters: all others
    by name; tied ones are one.
    """
    names: dict[tuple[int, str], list[str]] = {}
    tensors: dict[int, list[tuple[int, str]]] = {}
    owner: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
    for prefix, module in modules.items():
        weight = stand_ins.get(f"{prefix}.weight" if prefix else "weight")
        held: dict[str, Any] = module._parameters
        if weight is not None:  # what else such a layer has (AQLM's codes and codebooks) is how its weight is stored
            held = {k: p for k, p in held.items() if k == "bias"} | {"weight": weight}
        for attr, p in held.items():
            if p is None:
                continue
            if isinstance(p, UninitializedParameter):
                raise ValueError(f"{prefix}.{attr}: not initialised yet (a lazy module); run the model once first")
            slot = (id(module), attr)
            names.setdefault(slot, []).append(f"{prefix}.{attr}" if prefix else attr)
            if slot not in owner:
                name = f"{prefix}.{attr}" if prefix else attr
                p = p if isinstance(p, QuantisedWeight) else parameters.get(name, p)
                owner[slot] = (module, p)
                tensors.setdefault(id(p), []).append(slot)
    out = {}
    for slot, (name, *aliases) in names.items():
        module, p = owner[slot]
        attr = slot[1]
        opaque = isinstance(p, QuantisedWeight)
        kind, bias = "linear" if opaque else _kind(module, p), attr.replace("weight", "bias")
        owned = bias != attr and (opaque or bias in module._parameters) and kind not in ("stack", "stack_t", "other")
        out[name] = Site(
            name=name,
            kind=kind,
            shape=p.shape,
            bias=name[: len(name) - len(attr)] + bias if owned else None,
            aliases=tuple(aliases),
            tied=tuple(names[s][0] for s in tensors[id(p)] if s != slot),
            quantised=opaque,
        )
    return out


def refuse_split(layer: nn.Module, name: str) -> None:
    """Raise ValueError if DeepSpeed has split the layer's parameters; name: the layer's."""
    for k, p in layer._parameters.items():
        if p is not None and p.numel() == 0 and hasattr(p, "ds_shape") and tuple(p.ds_shape) != tuple(p.shape):
            raise ValueError(
                f"{name}.{k}: DeepSpeed's ZeRO-3 has split this parameter {list(p.ds_shape)} over the processes, and "
                "there is nothing to adapt. Load the model without ZeRO-3 (outside of deepspeed.zero.Init), and shard "
                "what as_module returns by FSDP2"
            )


def refuse_partial(layer: nn.Module, name: str) -> None:
    """Raise ValueError if the layer has a part of its weight, without a DTensor that says so; name: the weight's."""
    for size in ("output_size", "input_size", "num_embeddings"):  # as Megatron's parallel layers have them
        whole, here = getattr(layer, size, None), getattr(layer, f"{size}_per_partition", None)
        if isinstance(here, int) and whole != here:
            raise ValueError(
                f"{name}: a {type(layer).__name__} has {here} of {whole} rows or columns of its weight on this process "
                "(Megatron's tensor parallelism), so each process would train an adapter of another layer. Convert the "
                "model to transformers' and shard it by torch's parallelize_module, or adapt it on one process"
            )


def refuse_occupied(model: nn.Module, name: str, pattern: str) -> None:
    """Raise ValueError if the parameter belongs to another library's adapter, or to a parametrization, at the place
    that the rule means; a rule that names such a part itself gets it."""
    path, parts = model, name.split(".")
    for i, part in enumerate(parts[:-1]):
        path = getattr(path, part)
        if part == "parametrizations" and part not in pattern and "original" not in pattern:
            raise ValueError(
                f"{name}: {'.'.join(parts[:i])} is parametrized, so rule {pattern!r} finds what its {parts[i + 1]} is "
                "computed from, and not that. Make it permanent with torch.nn.utils.parametrize."
                "remove_parametrizations, or name this parameter in the rule"
            )
        if of_peft(path) and parts[i + 1] not in pattern:
            raise ValueError(
                f"{name}: {'.'.join(parts[: i + 1])} is a {type(path).__name__} that PEFT put there, so rule "
                f"{pattern!r} finds its parts. Take the model back with unload() or merge_and_unload() first, or name "
                "the part in the rule"
            )


def of_peft(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT's around one of the model's."""
    around = not {"base_layer", "original_module"}.isdisjoint(module._modules)
    return around and hasattr(module, "adapter_layer_names")
