"""peftfn: adapters as plain trees of tensors, methods as pure functions, and a base model that is never changed."""

from peftfn.apply import Adapted, adapt
from peftfn.combine import Chain, add, chain, scale
from peftfn.convert import to_lora
from peftfn.formats import load, save
from peftfn.many import stack, unstack
from peftfn.method import Method
from peftfn.methods import *  # noqa: F403
from peftfn.methods import __all__ as _methods
from peftfn.plan import Adapter
from peftfn.rng import Rng
from peftfn.site import Site, sites
from peftfn.summary import summary
from peftfn.targets import targets

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Adapter",
    "Chain",
    "Method",
    "Rng",
    "Site",
    "adapt",
    "add",
    "chain",
    "load",
    "save",
    "scale",
    "sites",
    "stack",
    "summary",
    "targets",
    "to_lora",
    "unstack",
    *_methods,
]
