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


def stream(where: str, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches. TypeError for one batch in their place, which would be read along its rows or keys."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{where}: batches is a {type(batches).__name__}; give an iterable of batches: a data loader, a generator, "
            "or [batch]"
        )
    return batches


def see_inputs(
    where: str, net: Adapted, sites: Iterable[str], batches: Iterable[Any], see: Callable[[list[str], Tensor], None]
) -> None:
    """Run the model in eval mode on each batch, and give `see` the input [tokens, in] of each site's layer, in fp32 or
    wider; one call for the sites, next to each other, that have one input (query, key and value).

    Where a batch has an `attention_mask`, tokens that it masks are left out.

    Raises:
        TypeError: one batch in place of an iterable of them.
        ValueError: there is no batch, or one that a site's layer does not see, or whose inputs are empty or not finite;
            it names the site.
    """
    copy = lasting_copy(net.model).eval()
    names = {site: net.plan[site].site.module for site in sites}
    group: list[Any] = [[], None]  # the sites of the last input, and the input
    seen: set[str] = set()
    mask: Tensor | None = None

    count = 0

    def flush() -> None:
        if group[0]:
            x = group[1]
            x = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x
            rows = wide(x.reshape(-1, x.shape[-1]))
            if not len(rows):
                raise ValueError(f"{where}: {group[0][0]}: batch {count} has no tokens for its layer; leave it out")
            if not rows.isfinite().all():
                raise ValueError(f"{where}: {group[0][0]}: its input in batch {count} has values that are not finite")
            see(group[0], rows)
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
    for count, batch in enumerate(stream(where, batches), 1):
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


@torch.inference_mode(False)  # else there are no gradients, whatever enable_grad says
def see_gradients(
    where: str,
    net: Adapted,
    sites: Iterable[str],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    see: Callable[[str, Tensor], None],
) -> int:
    """Run the model on each batch, and give `see` the gradient of the loss in each site's weight, in the parameter's
    own shape: one at a time, as the backward pass makes them. Returns the number of batches.

    Raises:
        TypeError: one batch in place of an iterable of them.
        ValueError: there is no batch; an output has no `loss` and no function is given; the loss is no scalar; it does
            not depend on a weight, or has a gradient there that is not finite; it names the site.
    """
    plain, weights = unadapted(net), net.weights
    params = {n: weights[n].detach().requires_grad_() for n in sites}
    seen: set[str] = set()
    count = 0

    def hook(n: str) -> Callable[[Tensor], None]:
        def note(p: Tensor) -> None:
            g, p.grad = p.grad, None  # what was seen is freed before the next gradient is made
            assert g is not None
            if not g.isfinite().all():
                raise ValueError(f"{where}: {n}: its gradient in batch {count} has values that are not finite")
            seen.add(n)
            see(n, g)

        return note

    for n, p in params.items():
        p.register_post_accumulate_grad_hook(hook(n))
    for count, batch in enumerate(stream(where, batches), 1):
        args, kwargs = call_of(batch)
        seen.clear()
        with torch.enable_grad():
            out = plain.apply({}, *args, params=params, **kwargs)
            value = getattr(out, "loss", None) if loss is None else loss(out, batch)
            if value is None:
                raise ValueError(f"{where}: the output has no loss: give labels in the batch, or loss=f(output, batch)")
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where}: the loss of batch {count} is {shape}; it must be a tensor of one number")
            if value.requires_grad:
                torch.autograd.backward(value, inputs=list(params.values()))
        if missing := [n for n in params if n not in seen]:
            raise ValueError(
                f"{where}: {missing[0]}: the loss of batch {count} does not depend on it; leave the site out"
            )
    if not count:
        raise ValueError(f"{where}: batches is empty; give at least one batch (a generator runs only once)")
    return count


def gradients(
    where: str,
    net: Adapted,
    sites: Iterable[str],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None,
) -> dict[str, Tensor]:
    """The mean over the batches of the gradient of the loss in each site's canonical weight [out, in].

    Raises:
        ValueError: as `see_gradients`; or a gradient is zero.
    """
    names = list(sites)
    total: dict[str, Tensor] = {}

    def see(n: str, g: Tensor) -> None:
        total[n] = total[n] + g if n in total else g.to(torch.promote_types(g.dtype, torch.float32))

    count = see_gradients(where, net, names, batches, loss, see)
    for n in names:
        if not total[n].any():
            raise ValueError(f"{where}: {n}: the gradient is zero in all {count} batches, so there is nothing to go by")
    return {n: net.plan[n].site.canonical(total[n] / count) for n in names}
