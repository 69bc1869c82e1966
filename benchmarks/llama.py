"""A whole model, forward and training step: ours against PEFT and the bare base, all seven projections adapted."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.helpers import DoraCaching
from torch import Tensor, nn

from benchmarks.harness import BASE, OURS, Json, Options, Target, Times, row
from benchmarks.models import HAND, agree, by_hand, grads, leaves, like_peft, llama, pair, trained_by_hand

Call = Callable[..., Any]
Ways = dict[str, Callable[[], Any]]
PEFT = "PEFT"


def logits_of(out: Any) -> Tensor:
    """A language model's logits, a plain module's output."""
    found: Any = getattr(out, "logits", out)
    assert isinstance(found, Tensor)
    return found


def loss_of(out: Any) -> Tensor:
    return logits_of(out).float().square().mean()


class Case:
    """One base model with one adapter, run in three ways that are checked to compute the same.

    base: called as base(x, **options); x are token ids, or the features of a plain module. probe: an x to check with.
    """

    def __init__(self, base: nn.Module, probe: Tensor, *, dora: bool, **options: Any):
        self.options, self.base = options, copy.deepcopy(base)
        self.peft, self.net, self.adapter = pair(base, dora)
        self.trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.check(probe)

    def ours(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.apply(self.adapter, *args, **kwargs)

    def check(self, x: Tensor) -> None:
        """Raise unless PEFT and we give the same outputs and the same gradients, and others than the base's."""
        mine, theirs, plain = (backed_output(f, x, self.options) for f in (self.ours, self.peft, self.base))
        agree(mine, theirs, "output")
        assert (mine - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapter does nothing: this would be no check"
        agree(grads(self.adapter), like_peft(self.peft, self.net, lambda p: p.grad), "gradient")
        for p in [*leaves(self.adapter), *self.trained]:
            p.grad = None

    def steps(self, x: Tensor, hand: bool = False) -> Ways:
        """Forward, backward, gradients dropped: a training step without its optimizer.

        The base's share is its forward pass and the gradient that goes back to the first layer's input.

        hand: whether LoRA's products written out in the model's layers are a way too.
        """

        def step(call: Call, parameters: Sequence[Tensor], *args: Any, **kwargs: Any) -> Callable[[], None]:
            def run() -> None:
                loss_of(call(*args, **kwargs, **self.options)).backward()  # type: ignore[no-untyped-call]
                for p in parameters:
                    p.grad = None

            return run

        first: Tensor
        if x.is_floating_point():
            first = x.clone().requires_grad_()
            base = step(self.base, [first], first)
        else:
            model: Any = self.base
            first = model.get_input_embeddings()(x).requires_grad_()
            base = step(model, [first], inputs_embeds=first)
        ways: Ways = {OURS: step(self.ours, leaves(self.adapter), x), PEFT: step(self.peft, self.trained, x)}
        if hand:
            written = trained_by_hand(self.base, self.net, self.adapter)
            agree(*(backed_output(f, x, self.options) for f in (self.ours, written)), "by hand")
            layers = {site: written.get_submodule(site.removesuffix(".weight")) for site in self.net.plan}
            own = {site: {k: layer.get_parameter(k) for k in "ab"} for site, layer in layers.items()}
            agree(grads(self.adapter), grads(own), "gradient by hand")
            ways[HAND] = step(written, leaves(own), x)
            for p in [*leaves(self.adapter), *leaves(own)]:
                p.grad = None
        return {**ways, BASE: base}

    def forwards(self, x: Tensor) -> Ways:
        return {n: quiet(f, x, **self.options) for n, f in ((OURS, self.ours), (PEFT, self.peft), (BASE, self.base))}

    def with_hand(self, x: Tensor) -> Ways:
        """`forwards`, and LoRA's products written out in the model's layers."""
        ways = self.forwards(x)
        written = by_hand(self.base, [(self.net, self.adapter, range(len(x)))])
        ways[HAND] = quiet(written, x, **self.options)
        agree(logits_of(ways[OURS]()), logits_of(ways[HAND]()), "by hand")
        return ways


def backed_output(call: Call, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The output; a backward pass has left its gradients where they belong."""
    out = call(x, **options)
    loss = loss_of(out)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return logits_of(out).detach()


def quiet(call: Call, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """The call without a gradient."""

    def run() -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return run


class Linears(nn.Module):
    """Nothing but small linear layers: a model that is all call overhead."""

    def __init__(self, n: int, d: int):
        super().__init__()
        self.q_proj = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(n))
        for p in self.parameters():
            nn.init.orthogonal_(p)  # so that the signal neither dies nor explodes on its way

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.q_proj:
            x = linear(x)
        return x


def training(options: Options) -> list[Json]:
    """Four layers of width 512: products of matrices take nearly all of the time."""
    rows = []
    ids = torch.randint(0, 1000, (4, 128))
    for name, most in (("LoRA", {128: 0.95, 32: 0.95}), ("DoRA", {128: 0.80, 32: 0.66})):
        case = Case(llama(4, 512, 1408, 8), ids[:2, :16], dora=name == "DoRA", use_cache=False)
        for tokens in (128, 32):
            what = f"{name} r16, training step, 4 layers, d 512, 4×{tokens} tokens"
            times = options.compare(case.steps(ids[:, :tokens]))
            target = Target(PEFT, most[tokens])
            rows.append(row(what, times, target=target, reason="The base's own products bound it: see the floor."))
        times = options.compare(case.forwards(ids))
        rows.append(row(f"{name} r16, forward, 4 layers, d 512, 4×128 tokens", times))
    return rows


def overhead(options: Options) -> list[Json]:
    """224 sites and one row: what a call costs besides arithmetic."""
    reason = (
        "LoRA's products written out in the model's layers, with nothing asked or checked, take what the column says."
    )
    x, where = torch.randn(4, 64), "224 linear layers, d 64, one row"
    case = Case(Linears(224, 64).requires_grad_(False), x, dora=False)
    times = options.compare(case.with_hand(x[:1]))
    rows = [
        row(f"LoRA r16, forward, {where}", times, target=Target(PEFT, 0.42), reason=reason),
        row(f"LoRA r16, forward, {where}, of the base", less(times, PEFT), target=Target(BASE, 2.0), reason=reason),
        row(
            f"LoRA r16, training step, {where}",
            options.compare(case.steps(x[:1], hand=True)),
            target=Target(PEFT, 0.60),
            reason=reason,
        ),
    ]
    ids, where = torch.randint(0, 1000, (2, 8)), "32-layer Llama, d 256, 224 sites, one token"
    case = Case(llama(32, 256, 704, 4), ids, dora=False, use_cache=False)
    times = options.compare(case.with_hand(ids[:1, :1]))
    rows += [
        row(f"LoRA r16, forward, {where}", times, target=Target(PEFT, 0.80), reason=reason),
        row(f"LoRA r16, forward, {where}, of the base", less(times, PEFT), target=Target(BASE, 1.22), reason=reason),
        row(f"LoRA r16, forward, {where}: time beyond the base's", less(times, HAND), beyond=BASE),
        row(f"LoRA r16, training step, {where}", options.compare(case.steps(ids[:1, :1]))),
    ]
    case = Case(llama(32, 256, 704, 4), ids, dora=True, use_cache=False)
    rows.append(row(f"DoRA r16, forward, {where}", options.compare(case.forwards(ids[:1, :1]))))
    return [*rows, decode(case, ids[:1, :1], options, where)]


def less(times: Times, name: str) -> Times:
    """Without one way."""
    return {k: t for k, t in times.items() if k != name}


def decode(case: Case, x: Tensor, options: Options, where: str) -> Json:
    """DoRA when serving: ours prepared once, PEFT as it comes and with the norms it can cache in eval mode."""
    for model in (case.peft, case.net.model, case.base):
        model.eval()
    prepared = case.net.prepare({site: {k: t.detach() for k, t in leaf.items()} for site, leaf in case.adapter.items()})
    caching = copy.deepcopy(case.peft)  # a call without DoraCaching would clear its caches

    def cached() -> Any:
        with DoraCaching():
            return caching(x, **case.options)

    ways = case.forwards(x) | {
        OURS: quiet(case.net.apply, prepared, x, **case.options),
        "PEFT in DoraCaching": quiet(cached),
    }
    agree(ways[OURS]().logits, ways["PEFT in DoraCaching"]().logits, "prepared")
    times = options.compare(ways)
    reason = "Prepared, it is LoRA's call with one more product a layer, and LoRA's by hand takes what its row says."
    what = f"DoRA r16, forward in eval mode, prepared, {where}"
    return row(what, times, target=Target(PEFT, 0.24), reason=reason)


def run(options: Options) -> list[Json]:
    torch.manual_seed(2)
    return training(options) + overhead(options)
