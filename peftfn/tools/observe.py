"""What a model computes on batches: the inputs of its layers, and the gradients of its weights. It is never changed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.plan import Plan
from peftfn.model.structure import lasting_copy
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(arguments, keyword arguments) of a batch: a mapping, a tuple or list of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def unadapted(net: Adapted) -> Adapted:
    """A net without sites, which calls the model as it is, or with other parameters."""
    return Adapted(net.model, Plan({}, {}, {}))


def see_inputs(
    where: str, net: Adapted, sites: Iterable[str], batches: Iterable[Any], see: Callable[[list[str], Tensor], None]
) -> None:
    """Run the model in eval mode on each batch, and give `see` the input [tokens, in] of each site's layer, in fp32 or
    wider; one call for the sites, next to each other, that have one input (query, key and value).

    Where a batch has an `attention_mask`, tokens that it masks are left out.

    Raises:
        ValueError: there is no batch, or a batch that a site's layer does not see; it names the site.
    """
    copy = lasting_copy(net.model).eval()
    names = {site: net.plan[site].site.module for site in sites}
    group: list[Any] = [[], None]  # the sites of the last input, and the input
    seen: set[str] = set()
    mask: Tensor | None = None

    def flush() -> None:
        if group[0]:
            x = group[1]
            x = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x
            see(group[0], wide(x.reshape(-1, x.shape[-1])))
        group[:] = [[], None]

    def hook(site: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...]) -> None:
            if group[1] is not args[0]:
                flush()
                group[1] = args[0]
            group[0].append(site)
            seen.add(site)

        return note

    for site, name in names.items():
        copy.get_submodule(name).register_forward_pre_hook(hook(site))
    count = 0
    for count, batch in enumerate(batches, 1):
        args, kwargs = call_of(batch)
        mask = kwargs.get("attention_mask")
        seen.clear()
        with torch.no_grad():
            copy(*args, **kwargs)
        flush()
        if missing := [s for s in names if s not in seen]:
            raise ValueError(
                f"{where}: {missing[0]}: its layer has no input in batch {count}; leave the site out, or give batches "
                "that reach it"
            )
    if not count:
        raise ValueError(f"{where}: batches is empty; give at least one batch (a generator runs only once)")


def gradients(
    where: str,
    net: Adapted,
    sites: Iterable[str],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
) -> dict[str, Tensor]:
    """The mean over the batches of the gradient of the loss in each site's canonical weight [out, in].

    Raises:
        ValueError: there is no batch, an output has no `loss` and no function is given, or a gradient is missing.
    """
    plain, weights = unadapted(net), net.weights
    params = {n: weights[n].detach().requires_grad_() for n in sites}
    total = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in params.items()}
    count = 0
    for count, batch in enumerate(batches, 1):
        args, kwargs = call_of(batch)
        with torch.enable_grad():
            out = plain.apply({}, *args, params=params, **kwargs)
            value = getattr(out, "loss", None) if loss is None else loss(out, batch)
            if value is None:
                raise ValueError(f"{where}: the output has no loss: give labels in the batch, or loss=f(output, batch)")
            found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for n, g in zip(params, found, strict=True):
            if g is None:
                raise ValueError(f"{where}: {n}: the loss of batch {count} does not depend on it; leave the site out")
            total[n] += g
    if not count:
        raise ValueError(f"{where}: batches is empty; give at least one batch (a generator runs only once)")
    return {n: net.plan[n].site.canonical(t / count) for n, t in total.items()}
