"""peftfn: parameter-efficient adapters as plain trees of tensors, methods as pure functions, on a base model that is
never changed.

Example:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
    adapter = net.init(seed=0)
    y = net.apply(adapter, torch.randn(3, 8))
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftfn.api import *  # noqa: F403
    from peftfn.methods import *  # noqa: F403

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What users call. The rooms of the package (`core`, `net`, …) are attributes too, and no part of the interface."""
    return [*import_module("peftfn.api").__all__, *(name for name in globals() if name.startswith("__"))]


if not TYPE_CHECKING:  # to a type checker, every name would exist

    def __getattr__(name: str) -> Any:
        """A public name. All are imported when the first is asked for: torch takes a second, and `peftfn --help` needs
        none of it. AttributeError that says what to write in place of a name of PEFT's, or of a misspelt one."""
        if name.startswith("__") and name != "__all__":  # what Python asks a module for
            raise AttributeError(f"module 'peftfn' has no attribute {name!r}")
        if (room := sys.modules.get(f"peftfn.{name}")) is not None:  # one that is being imported
            return room
        api = import_module("peftfn.api")
        globals().update({n: getattr(api, n) for n in api.__all__}, __all__=api.__all__)
        if name in globals():
            return globals()[name]
        raise AttributeError(import_module("peftfn.tools.cures").unknown(name, api.__all__))
