"""PEFT's tensors and configuration in memory, both ways: what `get_peft_model_state_dict` returns, without a file."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.method import Method
from peftfn.formats import peft
from peftfn.formats.bare import configuration
from peftfn.formats.beyond import Beyond
from peftfn.formats.files import Loaded, Options, on_devices, refuse_sharded
from peftfn.formats.occupied import refuse_adapters
from peftfn.formats.peft_config import checked
from peftfn.formats.peft_extra import about, check_type, given
from peftfn.formats.peft_write import documents
from peftfn.formats.tensor_files import DTYPES, Tensors
from peftfn.model.model import Model
from peftfn.net.net import Adapted, check_net

_WHERE = Path("(state dict)")
"""What errors call it where a file has a path."""


def state_dict(
    net: Adapted, adapter: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter as PEFT has it in memory: its tensors and its configuration.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.
        extra: further keys of the configuration, as for `save(…, format="peft")`.

    Returns:
        (tensors, configuration): what `get_peft_model_state_dict` returns and `set_peft_model_state_dict` takes, under
        PEFT's names; and what is in adapter_config.json.

    Raises:
        ValueError: PEFT cannot express the plan, or tensors are sharded; it names the sites.
        KeyError, TypeError: `adapter` is not one of `net`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        tensors, config = pf.state_dict(net, net.init())
        assert list(tensors) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    """
    check_net("state_dict", net)
    net.plan.check(adapter)
    refuse_sharded(net.plan, adapter)
    more = {**about(net.model), **given(extra, net)}
    config, tensors = documents(net, adapter, task=more.get("task_type"), beyond=Beyond.of(net.model))[""]
    check_type(more, config["peft_type"])
    return tensors, config | more


def from_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Any = None,
    *,
    method: Method | None = None,
    strict: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> Loaded:
    """Bind PEFT's tensors in memory to a model, as `load` does those of a folder.

    Args:
        model: the base, without adapters of other libraries.
        tensors: PEFT's name → tensor, with or without the adapter's name in it. They are copied.
        config: PEFT's configuration: a `PeftConfig`, or a dict as in adapter_config.json.
        method: what the tensors mean, in place of a configuration; ranks are those of the tensors.
        strict, key_mapping, ignore: as for `load`.

    Returns:
        A `Loaded`: `net, adapter = from_state_dict(…)`.

    Raises:
        ValueError: the tensors or the configuration do not fit the model; it names the key.
        TypeError: an argument is of another type.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.from_state_dict(model, *pf.state_dict(net, net.init()))
    """
    if not isinstance(model, nn.Module) or not isinstance(tensors, Mapping):
        raise TypeError(
            f"from_state_dict takes (model, tensors, config), not ({type(model).__name__}, {type(tensors).__name__}, "
            f"{type(config).__name__})"
        )
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.dtype not in DTYPES.values() or t.layout != torch.strided:
            raise TypeError(f"from_state_dict: {name} is not a plain tensor of {', '.join(DTYPES)}")
    known = Model.of(model)
    refuse_adapters(known)
    meta = {str(k): torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in tensors.items()}
    read = {str(k): partial(torch.Tensor.detach, t) for k, t in tensors.items()}
    file, options = Tensors(_WHERE, meta, read), Options(strict, key_mapping, ignore=tuple(ignore))
    if (config is None) == (method is None):
        raise TypeError("from_state_dict: give the configuration of the tensors, or method=pf.LoRA(alpha=16) for one")
    if method is not None:
        return on_devices(peft.build(known, configuration(method, file), file, _WHERE, options))
    plain = json.loads(json.dumps(config if isinstance(config, dict) else _dict(config), default=_listed))
    return on_devices(peft.build(known, checked(plain, _WHERE), file, _WHERE, options))


def _dict(config: Any) -> dict[str, Any]:
    if not hasattr(config, "to_dict"):
        raise TypeError(f"from_state_dict: config is a {type(config).__name__}; give a PeftConfig or a dict")
    return dict(config.to_dict())


def _listed(value: Any) -> list[Any]:
    """A PeftConfig has sets of names."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"from_state_dict: config has a {type(value).__name__}, which no adapter_config.json could have")
