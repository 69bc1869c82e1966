"""Every method on the same small Llama: ours against PEFT's same method, training step and forward, and their memory.

PEFT makes the adapter, at our method's default hyper-parameters, or those of `OPTIONS` where a default does not fit
this model. Ours is then loaded from PEFT's own checkpoint, so both hold the same numbers; their outputs are compared
before anything is timed. A method that PEFT does not have is timed against the bare base alone.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import peftfn as pf
from benchmarks.harness import BASE, OURS, Json, Options, Target, row
from benchmarks.llama import PEFT, Call, Ways, loss_of, quiet
from benchmarks.models import PROJECTIONS, RULE, agree, leaves, llama
from peftfn.core.method import Method, Weight, registry

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts memory is talkative
SIZES = {"layers": 3, "d": 256, "mlp": 768, "heads": 4}
TOKENS = (2, 32)
PREPARED = "prepared"
CONFIGS: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
TARGET = Target(PEFT, 1.0, 0.7)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
OPTIONS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"total_steps": 100},
    "DyLoRA": {"rank": 8},
    "FRoD": {"density": 0.01},
    "GLoRA": {"c": "none", "d_e": "none"},  # PEFT has none where a layer has no bias, as here
    "HRA": {"rank": 8},
    "KaSA": {"truncate": True},
    "LoRA": {"rank": 16},
    "DoRA": {"rank": 16},
    "QALoRA": {"pool": "sum"},
    "TiedTokens": {"tokens": tuple(range(0, 100, 5))},
    "TrainableTokens": {"tokens": tuple(range(0, 100, 5))},
}
"""Hyper-parameters other than the defaults."""
WHERE: dict[str, list[str]] = {
    "FRoD": ATTENTION,
    "Lily": ["q_proj"],
    "Full": NORMS,
    "TiedTokens": ["embed_tokens"],
    "TrainableTokens": ["embed_tokens"],
}
"""Modules other than all projections: FRoD wants inputs of one size, PEFT's Lily shares among layers of one name, and
`Full` is PEFT's LN-tuning."""
NOT_SAME = {
    "ALoRA": "PEFT's acts by the token ids that a PeftModel is called with, and this is a model with injected layers.",
    "Poly": "PEFT's asks for the task of each row in each call, and this is a model with injected layers.",
    "QALoRA": "PEFT pools at GPTQ layers alone; elsewhere its QA-LoRA is a plain LoRA.",
}
"""Methods that PEFT has under the same name, and not for these layers."""


WHY = "[Methods](methods.md#what-they-take) says why some take longer than PEFT's, by counting operations."


def methods() -> dict[str, Method]:
    """The library's methods that change weights by name, as they are timed."""
    every = ((n, c) for n, c in sorted(registry.items()) if c.__module__.startswith("peftfn.methods"))
    own = {n: c for n, c in every if issubclass(c, Weight) and c is not pf.ALoRA}  # whose files need gates in each call
    return {n: c(**OPTIONS.get(n, {})) for n, c in own.items()}


def configuration(method: Method, targets: list[str]) -> PeftConfig | None:
    """PEFT's configuration of the method; None if it does not have it."""
    if isinstance(method, pf.Full):
        return CONFIGS["LN_TUNING"](target_modules=targets)
    if "peft" not in vars(type(method)) or method.peft is None or type(method).__name__ in NOT_SAME:
        return None
    written = json.loads(json.dumps(method.peft.written(method)))
    if "feedforward_modules" in written:
        written["feedforward_modules"] = []
    made: PeftConfig = CONFIGS[method.peft.type](target_modules=targets, **written)
    return made


class Case:
    """One method on one base, in three ways (two if PEFT does not have it): ours, PEFT's, and the bare base."""

    def __init__(self, method: Method, base: nn.Module, probe: Tensor):
        name = type(method).__name__
        targets = WHERE.get(name, PROJECTIONS)
        self.base, self.theirs = copy.deepcopy(base), None
        config = configuration(method, targets)
        if config is None:
            rule = "|".join(targets) if name in WHERE else RULE
            self.net = pf.adapt(copy.deepcopy(base), {rule: method})
            self.adapter = self.net.init()
        else:
            self.theirs = injected(copy.deepcopy(base), config)
            with tempfile.TemporaryDirectory() as folder:
                self.theirs.save_pretrained(folder)
                self.net, self.adapter = pf.load(folder, copy.deepcopy(base))
        for t in leaves(self.adapter):
            t.requires_grad_()
        self.trained = [] if self.theirs is None else [p for p in self.theirs.parameters() if p.requires_grad]
        self.check(probe)

    def ours(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.apply(self.adapter, *args, **kwargs)

    def models(self) -> list[nn.Module]:
        return [self.base, self.net.model, *([] if self.theirs is None else [self.theirs])]

    def check(self, x: Tensor) -> None:
        """Raise unless PEFT and we give the same outputs, and every leaf gets a gradient."""
        for model in self.models():
            model.eval()
        if self.theirs is not None:
            mine, theirs = (quiet(f, x, use_cache=False)().logits for f in (self.ours, self.theirs))
            agree(mine, theirs, "output", 1e-3)
        for model in self.models():
            model.train()
        loss_of(self.ours(x, use_cache=False)).backward()  # type: ignore[no-untyped-call]
        missing = [f"{n}: {k}" for n, leaf in self.adapter.items() for k, t in leaf.items() if t.grad is None]
        assert not missing, f"no gradient: {missing[:3]}"
        for t in leaves(self.adapter):
            t.grad = None

    def steps(self, x: Tensor) -> Ways:
        """Forward, backward, gradients dropped: a training step without its optimizer."""
        model: Any = self.base
        first = model.get_input_embeddings()(x).requires_grad_()
        ways: Ways = {OURS: step(self.ours, leaves(self.adapter), x), BASE: step(model, [first], inputs_embeds=first)}
        return ways if self.theirs is None else {**ways, PEFT: step(self.theirs, self.trained, x)}

    def forwards(self, x: Tensor) -> Ways:
        """Forward passes in eval mode; PREPARED is ours with what depends on the adapter alone done once."""
        calls: dict[str, Call] = {OURS: self.ours, BASE: self.base}
        calls |= {} if self.theirs is None else {PEFT: self.theirs}
        if any(entry.method.overrides("prepare") for entry in self.net.plan.values()):
            calls[PREPARED] = partial(self.net.apply, self.net.prepare(detached(self.adapter)))
        for model in self.models():
            model.eval()
        return {name: quiet(call, x, use_cache=False) for name, call in calls.items()}


def detached(adapter: pf.Adapter) -> pf.Adapter:
    return {site: {k: t.detach() for k, t in leaf.items()} for site, leaf in adapter.items()}


def injected(model: nn.Module, config: PeftConfig) -> PeftModel:
    """PEFT's model with every trained tensor moved from where it started. Its warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(made, PeftModel)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return made


def step(call: Call, parameters: Collection[Tensor], *args: Any, **kwargs: Any) -> Callable[[], None]:
    def run() -> None:
        loss_of(call(*args, use_cache=False, **kwargs)).backward()  # type: ignore[no-untyped-call]
        for p in parameters:
            p.grad = None

    return run


def peak(way: Callable[[], Any]) -> int:
    """The most bytes that are allocated at one time during a call, beyond those that were before it."""
    way()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        way()
    now = most = 0
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measured(name: str, method: Method, base: nn.Module, ids: Tensor, options: Options) -> list[Json]:
    """A training step, with what it trains and the memory it takes, and forward passes."""
    case = Case(method, base, ids[:2, :16])
    steps = case.steps(ids)
    target = None if case.theirs is None else TARGET
    note = NOT_SAME.get(name, "")
    trained = sum(t.numel() for t in leaves(case.adapter))
    memory = {way: round(peak(run) / 2**20, 2) for way, run in steps.items()}
    lines = [row(f"{name}, training step", options.compare(steps), target=target, note=note, reason=WHY)]
    lines[0] |= {"options": str(method), "trained": trained, "peak_mib": memory}
    times = options.compare(case.forwards(ids))
    prepared = times.pop(PREPARED, None)
    lines.append(row(f"{name}, forward", times, target=target, note=note, reason=WHY))
    if prepared is not None:
        lines.append(row(f"{name}, forward, prepared", {**times, OURS: prepared}, note=note))
    return [{"method": name, **line} for line in lines]


def run(options: Options, only: Collection[str] = ()) -> list[Json]:
    torch.manual_seed(4)
    base, ids = llama(**SIZES), torch.randint(0, 1000, TOKENS)
    chosen = {name: method for name, method in methods().items() if name in only or not only}
    return [line for name, method in chosen.items() for line in measured(name, method, base, ids, options)]
