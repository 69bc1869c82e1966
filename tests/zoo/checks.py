"""What must hold on every architecture: one function a law, each of one `Subject`. `CHECKS` has them in order.

The plain model with merged weights, run by torch's own functional_call on a copy, is what every call is compared with.
A check raises AssertionError where a law is broken, and NotApplicable where the plain model cannot do it either.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn.view.module import parameters_of

from .build import Subject
from .inputs import ROWS, Inputs, noise, run, tensors
from .purity import difference, state

METHOD = pf.LoRA(rank=2, alpha=4)
INDEX = [1, -1, 0, 1, -1]  # of ROWS rows: both adapters, and the base
NEW_TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
EXPLODES = 1e6  # gradients that are this large say nothing
Weights = Mapping[str, Tensor]


class NotApplicable(Exception):
    """The plain model cannot do what the check asks for, or its output says nothing."""


@contextmanager
def needed(what: str) -> Iterator[None]:
    """What the plain model, or PEFT, must do for the check to say anything."""
    try:
        yield
    except NotApplicable:
        raise
    except Exception as e:
        raise NotApplicable(f"{what}: {type(e).__name__}: {str(e)[:120]}") from e


# what is compared


def adapted(s: Subject) -> pf.Adapted:
    """A net over a copy of the model: of its linear layers, or of all weights where `adapts` says that these raise."""
    model = copy.deepcopy(s.model)
    try:
        return pf.adapt(model, pf.targets(model, METHOD, "all-linear"))
    except Exception:
        return pf.adapt(model, {r"weight(_[ih]h_l\d+)?$": METHOD})


def drawn(net: pf.Adapted, seed: int) -> pf.Adapter:
    """An adapter away from its initial values."""
    g = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: 0.15 * torch.randn(t.shape, generator=g), net.init())


def seeded(f: Callable[[], Any]) -> Any:
    """f(), with the random numbers that `run` gives the plain model."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return f()


def ours(net: pf.Adapted, a: pf.Adapter, inputs: Inputs, **more: Any) -> Any:
    return seeded(lambda: net.apply(a, **inputs, **more))


def merged(net: pf.Adapted, a: pf.Adapter) -> dict[str, Tensor]:
    """The merged weights; of tied slots that come out different, each its own."""
    try:
        return net.merge(a)
    except ValueError as e:
        if "untied" not in str(e) and "tied" not in str(e):
            raise
        return net.merge(a, untied=True)


def slots(model: nn.Module) -> list[str]:
    """The first name of every module's every parameter: tied ones each, a module in two places once."""
    return [
        f"{path}.{k}" if path else k
        for path, m in model.named_modules()
        for k, p in m._parameters.items()
        if p is not None
    ]


def plain(model: nn.Module, weights: Weights, inputs: Inputs) -> Any:
    """The output of a copy of the model with other weights."""
    model = copy.deepcopy(model)
    mine = {n: weights[n] for n in slots(model) if n in weights}
    return seeded(lambda: functional_call(model, mine, (), inputs, tie_weights=False))


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the model whose parameters are `weights`."""
    model = copy.deepcopy(model)
    for name in slots(model):
        path, _, k = name.rpartition(".")
        w = weights[name].detach().clone()
        model.get_submodule(path)._parameters[k] = nn.Parameter(w, requires_grad=w.is_floating_point())
    return model


def gap(got: Sequence[Tensor], want: Sequence[Tensor], tol: float = 5e-4) -> str:
    """Words for the first difference, relative to the tensor's largest value; empty if there is none."""
    if len(got) != len(want):
        return f"{len(got)} tensors instead of {len(want)}"
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.shape != w.shape:
            return f"tensor {i}: shape {list(g.shape)} instead of {list(w.shape)}"
        finite = w.isfinite()
        if not torch.equal(g.isfinite(), finite):
            return f"tensor {i}: not finite in other places"
        if finite.any():
            off, size = (g[finite] - w[finite]).abs().max().item(), w[finite].abs().max().item()
            if off > tol * max(1.0, size):
                return f"tensor {i}: differs by {off:.2g} where values reach {size:.2g}"
    return ""


def same(got: Any, want: Any, what: str = "") -> None:
    words = gap(tensors(got), tensors(want))
    assert not words, f"{what}{words}"


def loss_of(out: Any) -> Tensor:
    """A fixed random projection of an output's finite values."""
    terms = [
        (torch.where(t.detach().isfinite(), t, 0) * noise(*t.shape, seed=3)).sum() / t.numel() ** 0.5
        for t in tensors(out)
        if t.requires_grad and t.numel()
    ]
    if not terms:
        raise NotApplicable("nothing in the output has a gradient")
    return torch.stack([t.real for t in terms]).sum()


def leaves(a: pf.Adapter) -> dict[str, Tensor]:
    return {f"{site}/{k}": t for site, leaf in a.items() for k, t in leaf.items()}


def trainable(a: pf.Adapter) -> pf.Adapter:
    return tree_map(lambda t: t.detach().clone().requires_grad_(), a)


def gradient(loss: Tensor, a: pf.Adapter) -> dict[str, Tensor]:
    """Zeros where a leaf has no part in the loss."""
    named = leaves(a)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), grads, strict=True)}


def same_gradient(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tol: float = 2e-4) -> None:
    """Equal relative to the largest gradient of all."""
    assert got.keys() == want.keys()
    size = torch.stack([w.abs().max() for w in want.values() if w.numel()]).max().item()
    if not size < EXPLODES:  # NaN is not
        raise NotApplicable(f"the plain model's gradient explodes: {size}")
    for n, w in want.items():
        off = (got[n] - w).abs().max().item() if w.numel() else 0.0
        assert off <= tol * max(size, 1e-3), f"the gradient at {n} differs by {off:.2g}, the largest is {size:.2g}"


def plain_gradient(s: Subject, net: pf.Adapted, a: pf.Adapter, model: nn.Module | None = None) -> dict[str, Tensor]:
    a = trainable(a)
    weights = merged(net, a)
    with needed("the plain model has no gradient"):
        return gradient(loss_of(plain(model or s.model, weights, s.inputs)), a)


def takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or "kwargs" in parameters


# the checks


def adapts(s: Subject) -> None:
    """Rules for "all-linear" are found and accepted."""
    if not any(isinstance(m, nn.Linear | Conv1D) for m in s.model.modules()):
        raise NotApplicable("the model has no linear layer")
    model = copy.deepcopy(s.model)
    assert pf.adapt(model, pf.targets(model, METHOD, "all-linear")).plan


@torch.no_grad()
def identity(s: Subject) -> None:
    """A fresh adapter leaves the output unchanged."""
    net = adapted(s)
    same(ours(net, net.init(), s.inputs), run(copy.deepcopy(s.model), s.inputs))


@torch.no_grad()
def merging(s: Subject) -> None:
    """The plain model with merged weights gives what `apply` gives, which is not what the base gives."""
    net = adapted(s)
    a = drawn(net, 1)
    got = ours(net, a, s.inputs)
    same(got, plain(s.model, merged(net, a), s.inputs))
    if not gap(tensors(got), tensors(run(copy.deepcopy(s.model), s.inputs))):
        raise NotApplicable("an adapter does not change the output")


@torch.no_grad()
def hidden_states(s: Subject) -> None:
    """A call that asks for hidden states gives those of the merged model, each time."""
    if not takes(s.model, "output_hidden_states"):
        raise NotApplicable("the forward takes no output_hidden_states")
    net = adapted(s)
    a = drawn(net, 1)
    asked = {**s.inputs, "output_hidden_states": True}
    weights = merged(net, a)
    with needed("the plain model gives no hidden states"):
        want = states_of(plain(s.model, weights, asked))
        assert want, "none in its output"
    for n in ("first", "second"):
        got = states_of(ours(net, a, asked))
        assert got.keys() == want.keys(), f"{n} call: {sorted(got)} instead of {sorted(want)}"
        for k in want:
            assert len(got[k]) == len(want[k]), f"{n} call: {len(got[k])} {k} instead of {len(want[k])}"
            same(list(got[k]), list(want[k]), f"{n} call, {k}: ")


def states_of(out: Any) -> dict[str, Sequence[Any]]:
    items = out.items() if isinstance(out, Mapping) else ()
    return {k: v for k, v in items if k.endswith("hidden_states") and isinstance(v, list | tuple)}


def gradients(s: Subject) -> None:
    """The gradient through `apply` is the gradient through the merged weights."""
    net = adapted(s)
    a = trainable(drawn(net, 1))
    want = plain_gradient(s, net, a)
    same_gradient(gradient(loss_of(ours(net, a, s.inputs)), a), want)


def module_view(s: Subject) -> None:
    """`as_module` gives what `apply` gives, holds the adapter that it was given, and has its gradient."""
    net = adapted(s)
    a = drawn(net, 1)
    m = pf.as_module(net, a)
    same(list(leaves(pf.adapter_of(m)).values()), list(leaves(a).values()), "adapter_of: ")
    out = run(m, s.inputs)
    with torch.no_grad():
        same(out, plain(s.model, merged(net, a), s.inputs))
    want = plain_gradient(s, net, a)
    loss_of(out).backward()
    got = leaves(parameters_of(m))
    same_gradient({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in got.items()}, want)


@torch.no_grad()
def ensemble(s: Subject) -> None:
    """vmap over a stack of adapters gives what each gives alone."""
    net = adapted(s)
    many = [drawn(net, seed) for seed in (1, 2)]
    inputs = vmappable(s, [merged(net, a) for a in many], list(net.plan))
    got = vmap(lambda a: tuple(tensors(ours(net, a, inputs))))(pf.stack(many))
    singles = [tensors(ours(net, a, inputs)) for a in many]
    same(got, [torch.stack(t) for t in zip(*singles, strict=True)])


def vmappable(s: Subject, weights: Sequence[Weights], names: Sequence[str]) -> Inputs:
    """The inputs, without a cache if the plain model needs that to run under vmap."""
    rest = {n: p.detach() for n, p in s.model.named_parameters(remove_duplicate=False)}
    stacked = {n: torch.stack([w[n] for w in weights]) for n in names}
    first: Exception | None = None
    for inputs in (s.inputs, {**s.inputs, "use_cache": False}):
        try:
            model = copy.deepcopy(s.model)
            vmap(lambda w, m=model, i=inputs: tuple(tensors(plain(m, {**rest, **w}, i))))(stacked)
            return inputs
        except Exception as e:
            first = first or e
    raise NotApplicable(f"the plain model under vmap: {type(first).__name__}: {str(first)[:120]}")


def rows_of(out: Any, like: Sequence[Tensor]) -> list[list[Tensor]]:
    """For every row its part of each tensor that has the rows first, as the output for one row says (`like`)."""
    mine = [t for t, one in zip(tensors(out), like, strict=True) if t.dim() and t.shape == (ROWS, *one.shape[1:])]
    return [[t[i : i + 1] for t in mine] for i in range(ROWS)]


def one_row(out: Any, batch: Any) -> list[Tensor]:
    pairs = zip(tensors(out), tensors(batch), strict=True)
    return [t for t, b in pairs if t.dim() and b.dim() and b.shape == (ROWS, *t.shape[1:])]


@lru_cache(maxsize=1)
@torch.no_grad()
def base_rows(s: Subject) -> tuple[list[Any], str]:
    """The base's output for each row by itself, and why a batch says nothing about its rows (empty: it does).

    Raises:
        NotApplicable: there are no rows, or the plain model does not take one by itself.
    """
    parts = parts_of(s)
    with needed("one row by itself"):
        model = copy.deepcopy(s.model)
        base = [run(model, part) for part in parts]
    net = adapted(s)
    a = drawn(net, 2)
    singles = [ours(net, a, part) for part in parts]
    for out, each in ((run(copy.deepcopy(s.model), s.inputs), base), (ours(net, a, s.inputs), singles)):
        rows = rows_of(out, tensors(each[0]))
        if not rows[0]:
            return base, "the output has no rows"
        for row, single in zip(rows, each, strict=True):
            if words := gap(row, one_row(single, out)):
                return base, f"the base's rows depend on each other: {words}"
    return base, ""


def parts_of(s: Subject) -> list[Inputs]:
    if s.cut is None:
        raise NotApplicable("the inputs have no rows")
    return [s.cut(s.inputs, i) for i in range(ROWS)]


def alone(s: Subject, net: pf.Adapted, many: Sequence[pf.Adapter]) -> list[Any]:
    """The output for each row by itself, under the adapter that INDEX gives it."""
    base, words = base_rows(s)
    if words:
        raise NotApplicable(words)
    return [
        base[i] if k < 0 else ours(net, many[k], part)
        for i, (k, part) in enumerate(zip(INDEX, parts_of(s), strict=True))
    ]


@torch.no_grad()
def mixed_batch(s: Subject) -> None:
    """Row i of a mixed batch is what adapter index[i] gives for row i alone."""
    parts_of(s)
    net = adapted(s)
    many = [drawn(net, seed) for seed in (1, 2)]
    out = seeded(lambda: net.mixed(pf.stack(many), INDEX, **s.inputs))
    singles = alone(s, net, many)
    for i, (row, single) in enumerate(zip(rows_of(out, tensors(singles[0])), singles, strict=True)):
        same(row, one_row(single, out), f"row {i}: ")


def mixed_gradient(s: Subject) -> None:
    """The gradient of a mixed batch is the sum of its rows' gradients."""
    parts_of(s)
    net = adapted(s)
    many = [trainable(drawn(net, seed)) for seed in (1, 2)]
    both = {f"{i} {site}": leaf for i, a in enumerate(many) for site, leaf in a.items()}
    out = seeded(lambda: net.mixed(pf.stack(many), INDEX, **s.inputs))
    singles = alone(s, net, many)
    rows = rows_of(out, tensors(singles[0]))
    mine = [i for i, k in enumerate(INDEX) if k >= 0]
    try:
        got = gradient(torch.stack([row_loss(rows[i], i) for i in mine]).sum(), both)
    except Exception:
        plain_gradient(s, net, many[0])  # raises NotApplicable if the plain model has none
        raise
    want = gradient(torch.stack([row_loss(one_row(singles[i], out), i) for i in mine]).sum(), both)
    same_gradient(got, want, 2e-3)


def row_loss(ts: Sequence[Tensor], i: int) -> Tensor:
    terms = [(t * noise(*t.shape, seed=i)).sum() / t.numel() ** 0.5 for t in ts if t.requires_grad]
    if not terms:
        raise NotApplicable("nothing in the output's rows has a gradient")
    return torch.stack([t.real for t in terms]).sum()


def prompt(s: Subject) -> Inputs:
    return prompt_of(s, s.inputs)


def prompt_of(s: Subject, inputs: Inputs) -> Inputs:
    if not s.generates:
        raise NotApplicable("the model does not generate")
    return {k: v for k, v in inputs.items() if k != "decoder_input_ids"}


def sequences(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


def continued(model: nn.Module, inputs: Inputs) -> Tensor:
    with needed("the merged model does not generate"):
        return sequences(seeded(lambda: model.generate(**inputs, **NEW_TOKENS)))


@torch.no_grad()
def generation(s: Subject) -> None:
    """`generate` gives the tokens that the merged model gives."""
    inputs, net = prompt(s), adapted(s)
    a = drawn(net, 1)
    want = continued(with_weights(s.model, merged(net, a)), inputs)
    got = sequences(ours(net, a, inputs, **NEW_TOKENS, method="generate"))
    assert got.shape == want.shape and torch.allclose(got, want), f"{got.tolist()} instead of {want.tolist()}"


@torch.no_grad()
def mixed_generation(s: Subject) -> None:
    """Row i of a mixed `generate` has the tokens that row has under its own adapter."""
    inputs, net = prompt(s), adapted(s)
    parts_of(s)
    many = [drawn(net, seed) for seed in (1, 2)]
    single = [continued(with_weights(s.model, merged(net, a)), inputs) for a in many]
    single.append(continued(copy.deepcopy(s.model), inputs))
    got = sequences(seeded(lambda: net.mixed(pf.stack(many), INDEX, **inputs, **NEW_TOKENS, method="generate")))
    if words := base_rows(s)[1]:
        raise NotApplicable(words)
    if any(t.shape != got.shape or len(t) != ROWS for t in single):
        raise NotApplicable("what is generated has no rows, or other lengths")
    want = torch.stack([single[k][i] for i, k in enumerate(INDEX)])
    if not torch.allclose(got, want):
        parts = [continued(copy.deepcopy(s.model), prompt_of(s, part)) for part in parts_of(s)]
        if any(len(p) != 1 or not torch.equal(p[0], t) for p, t in zip(parts, single[-1], strict=True)):
            raise NotApplicable("what the base generates for a row depends on the others")
    assert torch.allclose(got, want), f"{got.tolist()} instead of {want.tolist()}"


def peft_model(s: Subject, net: pf.Adapted) -> nn.Module:
    """PEFT's model over a copy: of "all-linear", or of our sites where PEFT does not know what that is."""
    common = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    try:
        model = get_peft_model(copy.deepcopy(s.model), LoraConfig(**common, target_modules="all-linear"))
    except Exception:
        names = sorted({site.removesuffix(".weight") for site in net.plan if site.endswith(".weight")})
        model = get_peft_model(copy.deepcopy(s.model), LoraConfig(**common, target_modules=names))
    attention = [n for n, m in s.model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    g = torch.Generator().manual_seed(5)
    for n, p in model.named_parameters():
        if "lora_" in n:  # PEFT ignores an adapter of a MultiheadAttention's out_proj in the forward
            ignored = any(f"{a}.out_proj." in n for a in attention)
            p.data = torch.zeros_like(p) if ignored else 0.15 * torch.randn(p.shape, generator=g)
    return model.eval()


def same_as_peft(got: Any, model: Any, s: Subject) -> None:
    """Where PEFT's layers and PEFT's merged model disagree with each other, there is nothing to agree with."""
    want = run(model.base_model.model, s.inputs)
    if words := gap(tensors(got), tensors(want)):
        with needed("PEFT does not merge"):
            other = run(copy.deepcopy(model).merge_and_unload(), s.inputs)
        if gap(tensors(other), tensors(want)):
            raise NotApplicable("PEFT's model and its merged model differ")
        raise AssertionError(words)


@torch.no_grad()
def reads_peft(s: Subject) -> None:
    """What PEFT saved gives, loaded, what PEFT gives."""
    with tempfile.TemporaryDirectory() as folder:
        with needed("PEFT"):
            theirs = peft_model(s, adapted(s))
            run(theirs.base_model.model, s.inputs)
            theirs.save_pretrained(folder, save_embedding_layers=False)
        net, a = pf.load(folder, copy.deepcopy(s.model))
        same_as_peft(ours(net, a, s.inputs), theirs, s)


@torch.no_grad()
def peft_reads(s: Subject) -> None:
    """What we save in PEFT's format gives, loaded by PEFT, what we give."""
    net = adapted(s)
    a = drawn(net, 1)
    with needed("PEFT"):
        run(peft_model(s, net).base_model.model, s.inputs)
    with tempfile.TemporaryDirectory() as folder:
        pf.save(Path(folder, "ours"), net, a, format="peft")
        theirs = PeftModel.from_pretrained(copy.deepcopy(s.model), Path(folder, "ours")).eval()
        same_as_peft(ours(net, a, s.inputs), theirs, s)


def rematerialised(s: Subject) -> None:
    """Gradient checkpointing in training mode changes no gradient, and nothing of the base."""
    if not getattr(s.model, "supports_gradient_checkpointing", False):
        raise NotApplicable("the model has no gradient checkpointing")
    net = adapted(s)
    a = trainable(drawn(net, 1))
    want = plain_gradient(s, net, a, training(s.model))
    model = training(s.model)
    with needed("gradient checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(run(with_weights(model, merged(net, a)), s.inputs)).backward()
    net = pf.adapt(model, dict(net.plan.rules))
    before = state(model)
    same_gradient(gradient(loss_of(ours(net, a, s.inputs)), a), want, 5e-4)
    assert not (words := difference(before, state(model))), f"the base has changed: {words}"


def training(model: nn.Module) -> nn.Module:
    """A copy in training mode, but for batch norms, whose statistics would make rows depend on each other."""
    model = copy.deepcopy(model).train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    return model


def purity(s: Subject) -> None:
    """No call changes a parameter, buffer, attribute, mode or hook of the base, nor does one that raises."""
    for mode in (False, True):
        net = adapted(s)
        net.model.train(mode)
        before = state(net.model)
        for name, call in calls(s, net, asked(s)).items():
            with suppress(Exception):  # other checks are about what it gives; this one is about what it leaves
                call()
            words = difference(before, state(net.model))
            assert not words, f"{name} in {'training' if mode else 'eval'} mode changes the base: {words}"


def asked(s: Subject) -> Inputs:
    """The inputs, and as much of hidden states and attentions as the plain model gives."""
    both = {"output_hidden_states": True, "output_attentions": True}
    for more in (both, {"output_hidden_states": True}):
        with suppress(Exception), torch.no_grad():
            run(copy.deepcopy(s.model), {**s.inputs, **more})
            return {**s.inputs, **more}
    return s.inputs


def calls(s: Subject, net: pf.Adapted, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    many = [drawn(net, seed) for seed in (1, 2)]
    a = trainable(many[0])
    out = {
        "apply": lambda: ours(net, a, inputs),
        "a second apply": lambda: ours(net, a, inputs),
        "a gradient": lambda: loss_of(ours(net, a, inputs)).backward(),
        "mixed": lambda: seeded(lambda: net.mixed(pf.stack(many), INDEX, **inputs)),
        "vmap": lambda: vmap(lambda a: tuple(tensors(ours(net, a, inputs))))(pf.stack(many)),
        "as_module": lambda: loss_of(run(pf.as_module(net, a), inputs)).backward(),
    }
    if s.generates and not net.model.training:
        text = prompt(s)
        out["generate"] = lambda: ours(net, many[0], text, **NEW_TOKENS, method="generate")
    return out


CHECKS: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        *(adapts, identity, merging, hidden_states, gradients, module_view, ensemble, mixed_batch, mixed_gradient),
        *(generation, mixed_generation, reads_peft, peft_reads, rematerialised, purity),
    )
}
