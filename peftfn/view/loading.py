"""What happens where a state dict is loaded into a view: the base does not change."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from peftfn.view.active import View
from peftfn.view.held import Held


def unshare(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a layer loads its part of a state dict, also through a wrapper around the view: a tensor whose values
    differ from the base's gets its own storage, so that the base does not change. ValueError while an adapter of the
    view is offloaded to meta.
    """
    ours: set[str] = set()
    if isinstance(module, View):
        refuse_empty(module, "load_state_dict")
        ours = {name for banks in module._peftfn.banks.values() for paths in banks.values() for _, name in paths}
        for name in _stand_ins(module, state_dict, prefix):
            del state_dict[name]  # of torch's own dictionary
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        given = state_dict.get(prefix + name)
        if name in ours or t is None or type(t.data) is not Tensor or given is None or _equal(t, given):
            continue
        t.data = t.data.clone()


def _stand_ins(view: Any, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The empty tensors in a state that stand for a parameter of the base, which `save_pretrained` left out."""
    empty = [k for k, t in state_dict.items() if k.startswith(prefix) and getattr(t, "shape", None) == (0,)]
    held = {prefix + k: p.shape for k, p in view.named_parameters(remove_duplicate=False)} if empty else {}
    held |= {prefix + site: None for plan in view._peftfn.plans.values() for site in plan}
    return [k for k in empty if k in held and held[k] != (0,)]


def refuse_empty(view: Any, what: str) -> None:
    """Raise ValueError if an adapter of the view has no values because it was offloaded to meta."""
    for module in view.modules():
        for name, leaf in module._modules.items() if isinstance(module, Held) else ():
            if name in view._peftfn.offloaded and any(p.is_meta for p in leaf.parameters()):
                raise ValueError(
                    f"{what}: adapter {name!r} is offloaded to meta and has no values at {module.site}; bring it back "
                    f"first, peftfn.onload_(m, {name!r}, what offload_ returned)"
                )


def _equal(t: Tensor, given: Any) -> bool:
    same = isinstance(given, Tensor) and given.shape == t.shape and given.dtype == t.dtype and given.device == t.device
    return same and not t.is_meta and torch.equal(t, given)
