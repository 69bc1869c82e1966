"""peftfn: adapters as plain trees of tensors, methods as pure functions, and a base model that is never changed."""

from peftfn import optim
from peftfn.apply import Adapted, adapt
from peftfn.bank import Bank, BankBusy, bank
from peftfn.combine import Chain, add, chain, scale
from peftfn.conform import conform
from peftfn.convert import to_lora
from peftfn.describe import Described, Description, describe
from peftfn.distributed import distribute, gather, merged
from peftfn.formats import load, save
from peftfn.formats.files import Loaded
from peftfn.formats.several import load_all
from peftfn.fresh import reset_
from peftfn.gated import alora_gates
from peftfn.many import stack, unstack
from peftfn.method import Method
from peftfn.methods import *  # noqa: F403
from peftfn.methods import __all__ as _methods
from peftfn.module import adapter_of, as_module, base_of, copy_, offload_, onload_, status, trainable_
from peftfn.nets import Nets
from peftfn.plan import Adapter
from peftfn.rng import Rng
from peftfn.site import Site, sites
from peftfn.summary import summary
from peftfn.targets import targets

__version__ = "0.1.0"
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
    "load",
    "load_all",
    "merged",
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
    *_methods,
]
