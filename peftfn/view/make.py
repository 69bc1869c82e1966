"""as_module: an adapter in an `nn.Module`, for the tools that want one. Trainer, generate, DDP, FSDP, export.

The module is a copy of the model's structure that shares the storage of its parameters. Each site has a
`torch.nn.utils.parametrize` parametrization, which holds the leaves of the site and returns the adapted weight
(`view.py`).
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from peftfn.core import functions
from peftfn.model.model import weights_of
from peftfn.model.structure import lasting_buffers, lasting_copy
from peftfn.net.net import Adapted
from peftfn.view.active import View
from peftfn.view.held import TAKEN
from peftfn.view.view import build, owner

DEFAULT = "default"


def as_module(
    net: Adapted,
    adapter: Mapping[str, Any] | None = None,
    /,
    *,
    copy_base: bool = False,
    trainable: bool = True,
    **named: Any,
) -> Any:
    """The adapted model as an `nn.Module` of the model's own class: isinstance, generate, config, signature.

    It shares the storage of the base's parameters, which do not require gradients in it. The leaves are its own
    parameters, copies of the adapter's tensors, and the only ones that train. It also has its own buffers, hooks,
    settings and modes, so adapter dropout follows its train() and eval(). The base does not change and stays usable.
    The factor of `scale(adapter, s)` is a buffer, and a parameter if s is a tensor that requires a gradient.

    Methods that act on some tokens alone (`ALoRA`) find them in the `input_ids` of each call, of the module itself or
    of its `generate`.

    Two names of one tied tensor are two sites, as in `adapt`: adapting an embedding does not change the head it is
    tied to, unless a rule takes both.

    Writing to the module's base parameters writes to the base, and so to every other module made of it. Tools that
    average all parameters do so: an EMA, a target or reference network. Make such a module with `copy_base=True`.

    Args:
        net: what `adapt` returned.
        adapter: the adapter to hold; its name in the module is "default".
        named: instead of `adapter`, several by name: an adapter of `net`, or a pair (another net of the same model, its
            adapter). The first is active until `use` or `use_` says otherwise.
        copy_base: whether the module copies the base's parameters instead of sharing them; it then takes the memory of
            a second base.
        trainable: whether the leaves require gradients; `trainable_` changes it later.

    Returns:
        The module, with three methods more than the model has. `with m.use(name): …` makes the adapter `name` active
        in this thread; None is the base, and a list of names the sum of these adapters, each times its number in
        `weights=[…]`. `m.use_(name)` makes it active in every thread, where no `use` says otherwise.
        `m.checkpoint_context` is the `context_fn` for your own calls of torch.utils.checkpoint.

    Raises:
        ValueError: no adapter, an invalid name, a net of another model, of such a module, or of a model whose
            parameters have other shapes now, or a layer that cannot hold an adapter: parametrized already, or with
            weights that a hook loads for each call (offload).
        TypeError: the model cannot be copied, or `net` is not a net.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        with m.use("two"):
            y = m(torch.randn(3, 8))
    """
    if not isinstance(net, Adapted):
        raise TypeError(f"as_module takes (net, adapter), and the first is a {type(net).__name__}; call adapt first")
    if (adapter is None) == (not named):
        raise ValueError("as_module: give an adapter, as_module(net, a), or several by name, as_module(net, x=a, y=b)")
    if isinstance(net.model, View):
        raise ValueError(
            "as_module: the net's model is a module that as_module made. Several adapters of one model are passed by "
            "name, as_module(net, x=a, y=(another net, b)); to adapt an adapted model again, merge its adapter first"
        )
    pairs = named if adapter is None else {DEFAULT: adapter}
    given = {name: v if isinstance(v, tuple) else (net, v) for name, v in pairs.items()}
    every = [other for other, _ in given.values() if isinstance(other, Adapted)]
    weights = weights_of(net.model, {s.name: s for other in every for s in other.plan.places}.values())
    for name, (other, a) in given.items():
        check_name("as_module", name)
        if other.model is not net.model:
            raise ValueError(f"as_module: the net of {name!r} adapts another model; call adapt on this one")
        other.plan.check(a)
        functions.checked(other.plan, weights)
    for site in dict.fromkeys(site for other, _ in given.values() for site in other.plan):
        _check_layer(net.model, site)
    pairs = {name: (other.plan, a) for name, (other, a) in given.items()}
    view = build(lasting_copy(net.model, copy_base), pairs, lasting_buffers(net.model), trainable)
    takes = signature(type(net.model).forward).parameters
    if "adapter_names" not in takes and any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        view.register_forward_pre_hook(_refuse_names, with_kwargs=True)
    return view


def _refuse_names(m: nn.Module, args: Any, kwargs: Any) -> None:
    """TypeError for PEFT's way to choose an adapter for each row, which a model's **kwargs would swallow."""
    if "adapter_names" in kwargs:
        raise TypeError(
            "adapter_names is PEFT's: write `with m.use(name): …` for an adapter of all rows; net.mixed(…) and a bank "
            "have one for each row"
        )


def check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what}: an adapter's name is a string, not {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or name in TAKEN:
        raise ValueError(f"{what}: an adapter cannot be named {name!r}, which torch does not allow for a module")


def _check_layer(model: nn.Module, site: str) -> None:
    layer, attr = owner(model, site)
    if attr in layer._modules or not attr:  # a module
        return
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{site}: its layer is parametrized already ({', '.join(layer.parametrizations)}). Make that permanent "
            "with torch.nn.utils.parametrize.remove_parametrizations, or leave this site out of the rules"
        )
