"""A whole model, forward and training step: ours against PEFT and the bare base, all seven projections adapted."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, row
from benchmarks.models import RULE, agree, grads, leaves, like_peft, llama, method, pair

Call = Callable[..., Any]
BASE = "base"


def loss_of(out: Any) -> Tensor:
    return out.logits.float().square().mean()


def step(call: Call, parameters: list[Tensor], ids: Tensor) -> Callable[[], None]:
    """Forward, backward, gradients dropped: what a training step is without its optimizer."""

    def run() -> None:
        loss_of(call(input_ids=ids, use_cache=False)).backward()  # type: ignore[no-untyped-call]
        for p in parameters:
            p.grad = None

    return run


def base_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """The base's share of a step: forward, and the gradient passed back to the first layer's input."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]

    def run() -> None:
        loss_of(model(inputs_embeds=embedded, use_cache=False)).backward()  # type: ignore[no-untyped-call]
        embedded.grad = None

    return run


def forward(call: Call, ids: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call(input_ids=ids, use_cache=False)

    return run


class Case:
    """One base model with one adapter, run in three ways that are checked to compute the same."""

    def __init__(self, base: nn.Module, dora: bool):
        self.base = copy.deepcopy(base)
        self.peft, self.net, self.adapter = pair(base, dora)
        self.trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.check(torch.randint(0, 1000, (2, 16)))

    def ours(self, **kwargs: Any) -> Any:
        return self.net.apply(self.adapter, **kwargs)

    def check(self, ids: Tensor) -> None:
        """Raise unless PEFT and we give the same logits and the same gradients."""
        mine, theirs = self.ours(input_ids=ids), self.peft(input_ids=ids)
        loss_of(mine).backward()  # type: ignore[no-untyped-call]
        loss_of(theirs).backward()  # type: ignore[no-untyped-call]
        agree(mine.logits, theirs.logits, "logits")
        plain = self.base(input_ids=ids).logits
        assert not torch.allclose(mine.logits, plain, rtol=1e-3, atol=1e-3), "the adapter does nothing: no check at all"
        agree(grads(self.adapter), like_peft(self.peft, self.net, lambda p: p.grad), "gradient")
        for p in [*leaves(self.adapter), *self.trained]:
            p.grad = None

    def steps(self, ids: Tensor) -> dict[str, Call]:
        return {
            OURS: step(self.ours, leaves(self.adapter), ids),
            "PEFT": step(self.peft, self.trained, ids),
            BASE: base_step(self.base, ids),
        }

    def forwards(self, ids: Tensor) -> dict[str, Call]:
        ways = {OURS: self.ours, "PEFT": self.peft, BASE: self.base}
        return {name: forward(call, ids) for name, call in ways.items()}


class Linears(nn.Module):
    """Nothing but small linear layers: a model that is all call overhead."""

    def __init__(self, n: int, d: int):
        super().__init__()
        self.q_proj = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.q_proj:
            x = linear(x)
        return x


def run(options: Options) -> list[Json]:
    rows: list[Json] = []

    def measure(case: str, ways: dict[str, Call], **facts: Any) -> None:
        rows.append(row(case, options.compare(ways), **facts))

    torch.manual_seed(2)
    middle, where = llama(4, 512, 1408, 8), "4 layers, d 512, 4×128 tokens"
    ids = torch.randint(0, 1000, (4, 128))
    for name, dora, target in [("LoRA", False, Target("PEFT", 0.95, 0.90)), ("DoRA", True, Target("PEFT", 0.7, 0.6))]:
        case = Case(middle, ids, dora)
        measure(f"{name} r16, training step, {where}", case.steps(), target=target)
        measure(f"{name} r16, forward, {where}", case.forwards())
    toy, where = llama(32, 256, 704, 4), "32 layers, d 256, 224 sites, one token"
    for name, dora in [("LoRA", False), ("DoRA", True)]:
        case = Case(toy, ids[:1, :1], dora)
        case_rows = options.compare(case.forwards())
        rows.append(row(f"{name} r16, forward, {where}", case_rows))
    return rows
