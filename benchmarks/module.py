"""The module view against net.apply and PEFT: a training step, eager and compiled, and what making one costs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, Times, row
from benchmarks.llama import Call, Case, Linears, backed_output, loss_of
from benchmarks.models import RULE, agree, grads, inject, leaves, llama, method
from peftfn.view.active import View
from peftfn.view.module import parameters_of

APPLY, PEFT = "net.apply", "PEFT"


class Modules(Case):
    """A case with its adapter in a module too, which is checked against net.apply."""

    def check(self, x: Tensor) -> None:
        super().check(x)
        # on a base of its own: net.apply would find the weights in the cache that the module has just filled
        net = pf.adapt(copy.deepcopy(self.net.model), self.net.plan.rules)
        self.module = pf.as_module(net, self.adapter)
        self.parameters = leaves(parameters_of(self.module))
        mine, theirs = (backed_output(f, x, self.options) for f in (self.module, self.ours))
        agree(mine, theirs, "output")
        agree(grads(parameters_of(self.module)), grads(self.adapter), "gradient")
        for p in [*leaves(self.adapter), *self.parameters]:
            p.grad = None

    def ways(self, x: Tensor, wrap: Callable[[Any], Any] = lambda f: f) -> dict[str, Callable[[], Any]]:
        def step(call: Call, parameters: list[Any]) -> Callable[[], None]:
            def run() -> None:
                loss_of(call(x, **self.options)).backward()  # type: ignore[no-untyped-call]
                for p in parameters:
                    p.grad = None

            return run

        apply = wrap(self.net.apply)
        return {
            OURS: step(wrap(self.module), self.parameters),
            APPLY: step(lambda *args, **kwargs: apply(self.adapter, *args, **kwargs), leaves(self.adapter)),
            PEFT: step(wrap(self.peft), self.trained),
        }


def compiled(f: Any) -> Any:
    return torch.compile(f, fullgraph=not isinstance(f, nn.Module) or isinstance(f, View))


def against(what: str, times: Times, of_peft: float | None) -> list[Json]:
    """A row with the target of the module against net.apply and, if there is one, a row with that against PEFT."""
    why = "A view looks up the tensors of each layer, since anybody may have replaced them; apply is handed them all."
    rows = [row(what, times, target=Target(APPLY, 1.03), reason=why)]
    if of_peft is not None:
        reason = "The base's own products bound it: “A whole model”, above, has the floor."
        without = {k: t for k, t in times.items() if k != APPLY}
        rows.append(row(f"{what}, of PEFT", without, target=Target(PEFT, of_peft), reason=reason))
    return rows


def run(options: Options) -> list[Json]:
    rows = []
    ids = torch.randint(0, 1000, (4, 128))
    for name in ("LoRA", "DoRA"):
        case = Modules(llama(4, 512, 1408, 8), ids[:2, :16], dora=name == "DoRA", use_cache=False)
        for tokens in (128, 16):
            what = f"{name} r16, training step, 4 layers, d 512, 4×{tokens} tokens"
            rows += against(what, options.compare(case.ways(ids[:, :tokens])), 0.95 if name == "LoRA" else None)
    x = torch.randn(4, 64)
    case = Modules(Linears(224, 64).requires_grad_(False), x, dora=False)
    what = "LoRA r16, training step, 224 linear layers, d 64, one row"
    rows += against(what, options.compare(case.ways(x[:1])), 0.95)
    case = Modules(llama(2, 256, 704, 4), ids[:2, :16], dora=False, use_cache=False)
    what = "LoRA r16, training step, compiled, 2 layers, d 256, 4×128 tokens"
    rows += against(what, options.compare(case.ways(ids, compiled)), 0.95)
    toy = llama(32, 256, 704, 4)

    def ours(model: nn.Module) -> nn.Module:
        net = pf.adapt(model, {RULE: method(dora=False)})
        made: nn.Module = pf.as_module(net, net.init())
        return made

    ways = {OURS: ours, PEFT: inject}
    what = "Making it: 32-layer toy (d 256), LoRA r16 at 224 sites, adapt + init + as_module"
    rows.append(row(what, options.compare(ways, fresh=lambda: copy.deepcopy(toy))))
    return rows
