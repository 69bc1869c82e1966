"""peftfn: parameter-efficient adapters as plain trees of tensors, methods as pure functions, on a base model that is
never changed.

Example:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
    adapter = net.init(seed=0)
    y = net.apply(adapter, torch.randn(3, 8))
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from peftfn import routing
from peftfn.core.combine import Chain, add, chain, scale
from peftfn.core.method import Method, Weight, registry
from peftfn.core.modulechain import ModuleChain
from peftfn.core.modules import ModuleMethod, Prefix, Tokens
from peftfn.core.plan import Adapter
from peftfn.core.rng import Rng
from peftfn.formats import load, save
from peftfn.formats.files import Loaded
from peftfn.formats.memory import from_state_dict, state_dict
from peftfn.formats.several import load_all, save_view
from peftfn.many.alora import alora_gates
from peftfn.many.bank import Bank, BankBusy, bank
from peftfn.many.conform import conform
from peftfn.many.nets import Nets
from peftfn.many.routing import Routed
from peftfn.many.stack import stack, unstack
from peftfn.methods import *  # noqa: F403
from peftfn.methods.parts.longlora import longlora
from peftfn.model.model import places, sites
from peftfn.model.place import Place
from peftfn.model.site import Site
from peftfn.net.distributed import distribute, gather
from peftfn.net.net import Adapted, adapt
from peftfn.slots.routes import PerForward
from peftfn.tools import optim
from peftfn.tools.convert import to_lora
from peftfn.tools.cures import unknown
from peftfn.tools.describe import Described, Description, describe
from peftfn.tools.summary import summary
from peftfn.tools.targets import targets
from peftfn.view.merged import merged
from peftfn.view.module import adapter_of, as_module, base_of, buffers_of, copy_, offload_, onload_, status, trainable_
from peftfn.view.reset import reset_
from peftfn.view.saving import save_pretrained
from peftfn.view.view import View

__version__ = "0.1.0"
View.saver = partial(save_pretrained, write=save_view)  # two rooms that do not know each other
__all__ = [
    "Adapted",
    "Adapter",
    "Bank",
    "BankBusy",
    "Chain",
    "Described",
    "Description",
    "Loaded",
    "Method",
    "ModuleChain",
    "ModuleMethod",
    "Nets",
    "PerForward",
    "Place",
    "Prefix",
    "Rng",
    "Routed",
    "Site",
    "Tokens",
    "Weight",
    "adapt",
    "adapter_of",
    "add",
    "alora_gates",
    "as_module",
    "bank",
    "base_of",
    "buffers_of",
    "chain",
    "conform",
    "copy_",
    "describe",
    "distribute",
    "from_state_dict",
    "gather",
    "load",
    "load_all",
    "longlora",
    "merged",
    "offload_",
    "onload_",
    "optim",
    "places",
    "reset_",
    "routing",
    "save",
    "scale",
    "sites",
    "stack",
    "state_dict",
    "status",
    "summary",
    "targets",
    "to_lora",
    "trainable_",
    "unstack",
    *sorted(registry.keys() - {"Chain", "ModuleChain"}),
]


def __dir__() -> list[str]:
    """What users call. The rooms of the package (`core`, `net`, …) are attributes too, and no part of the interface."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


if not TYPE_CHECKING:  # to a type checker, every name would exist

    def __getattr__(name: str) -> Any:
        """AttributeError that says what to write in place of a name of PEFT's, or of a misspelt one."""
        raise AttributeError(unknown(name, __all__))
