"""Every public name of peftfn. `peftfn` itself imports this file when a name is first asked for."""

from peftfn.core.combine import Chain, add, chain, scale
from peftfn.core.method import Method, Weight, registry
from peftfn.core.plan import Adapter
from peftfn.core.rng import Rng
from peftfn.formats import load, save
from peftfn.formats.files import Loaded
from peftfn.formats.several import load_all
from peftfn.many.alora import alora_gates
from peftfn.many.bank import Bank, BankBusy, bank
from peftfn.many.conform import conform
from peftfn.many.nets import Nets
from peftfn.many.stack import stack, unstack
from peftfn.methods import *  # noqa: F403
from peftfn.methods.parts.longlora import longlora
from peftfn.model.model import sites
from peftfn.model.site import Site
from peftfn.net.distributed import distribute, gather
from peftfn.net.net import Adapted, adapt
from peftfn.tensors.tree import leaves
from peftfn.tools import optim
from peftfn.tools.convert import to_lora
from peftfn.tools.describe import Described, Description, describe
from peftfn.tools.summary import summary
from peftfn.tools.targets import targets
from peftfn.view.merged import merged, merged_model
from peftfn.view.module import adapter_of, as_module, base_of, copy_, offload_, onload_, status, trainable_
from peftfn.view.reset import reset_

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
    "Nets",
    "Rng",
    "Site",
    "Weight",
    "adapt",
    "adapter_of",
    "add",
    "alora_gates",
    "as_module",
    "bank",
    "base_of",
    "chain",
    "conform",
    "copy_",
    "describe",
    "distribute",
    "gather",
    "leaves",
    "load",
    "load_all",
    "longlora",
    "merged",
    "merged_model",
    "offload_",
    "onload_",
    "optim",
    "reset_",
    "save",
    "scale",
    "sites",
    "stack",
    "status",
    "summary",
    "targets",
    "to_lora",
    "trainable_",
    "unstack",
    *sorted(registry.keys() - {"Chain"}),
]
