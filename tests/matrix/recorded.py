"""What PEFT's other tests adapt, caught as they run: each model with the configurations that they give to PEFT.

Most of PEFT's patterns (`rank_pattern`, `exclude_modules`, `modules_to_save`, `trainable_token_indices` …) and all its
pairs of active adapters stand in the middle of tests, in no table. So its tests run, with their models from the hub
replaced by small ones from configurations, and whether they pass is nothing to us.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import transformers
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer  # noqa: F401  (before the stand-ins: it asks which packages there are)

from .cases import BART, BERT, GEMMA, GPT, IDS, LLAMA, OPT, T5, Case, table
from .checks import output

MODULES = (
    "custom_models",
    "initialization",
    "low_level_api",
    "mixed",
    "other",
    "target_parameters",
    "token_classification_qa",
    "trainable_tokens",
    "tuners_utils",
    "vision_models",
)
TABLES = ("config_kwargs", "config_kwargs_1")
KEPT = ("test_multiple_active_adapters_forward", "test_training_decoders")
"""Tests over a table differ in what they ask of the same adapters: one of them is enough, and `cases` has others."""
COMMON = ("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
MOE = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 8}  # all: rounding flips no router
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": ("Llama4TextConfig", MOE | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}),
    "gptoss": ("GptOssConfig", MOE | {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gptneox": ("GPTNeoXConfig", BERT),
    "bloom": ("BloomConfig", {"vocab_size": 100, "hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "gpt2": ("GPT2Config", GPT),
    "llama": ("LlamaConfig", LLAMA),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "roberta": ("RobertaConfig", BERT),
    "bert": ("BertConfig", BERT),
    "bart": ("BartConfig", BART),
    "opt": ("OPTConfig", OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 5}),
    "t5": ("T5Config", T5 | {"decoder_start_token_id": 0}),
}
"""A part of a name on the hub ↦ a small configuration."""


SIZES: dict[type, Callable[[Any], list[int]]] = {
    nn.Linear: lambda m: [9, m.in_features],
    nn.Conv1d: lambda m: [4, m.in_channels, 16],
    nn.Conv2d: lambda m: [4, m.in_channels, 12, 12],
    nn.Conv3d: lambda m: [4, m.in_channels, 6, 6, 6],
}
"""A layer ↦ the shape of what it takes."""


@dataclass
class Seen:
    """A model as it was before PEFT changed it, what it was given, and the first inputs that it was called with."""

    test: str
    base: nn.Module
    configs: list[PeftConfig]
    inputs: dict[str, Tensor] = field(default_factory=dict)


class Watch:
    """A plug-in of pytest that keeps what is adapted."""

    def __init__(self) -> None:
        self.test, self.seen = "", list[Seen]()

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [i for i in items if i.name.split("[")[0] in KEPT or not _of_a_table(i)]

    @pytest.hookimpl
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid.rpartition("tests/")[2]
        torch.manual_seed(0)

    def made(self, model: nn.Module, base: nn.Module, config: PeftConfig) -> None:
        seen = Seen(self.test, base, [config])
        self.seen.append(seen)
        object.__setattr__(model, "_seen", seen)

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not seen.inputs:
                seen.inputs = _named(base, args, kwargs)

        model.register_forward_pre_hook(keep, with_kwargs=True)


def recorded(sdist: Path) -> Iterator[Case]:
    """A case for each model and configuration, and for each pair of configurations, that the tests use."""
    utilities = table(sdist, "testing_utils")
    watch, done = Watch(), set[str]()
    files = [str(sdist / "tests" / f"test_{name}.py") for name in MODULES]
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={sdist}"]
    with _watched(watch), patch.object(utilities, "hub_online_once", lambda _: nullcontext()):
        pytest.main([*options, "-o", "addopts=", *files], plugins=[watch])
    for seen in watch.seen:
        found = seen.inputs if _runs(seen.base, seen.inputs) else _usual(seen.base)
        for pair in [(c, None) for c in seen.configs] + [(seen.configs[0], c) for c in seen.configs[1:]]:
            key = json.dumps([_shapes(seen.base), *map(_settings, pair)], default=str)
            if key in done or not found:
                continue
            done.add(key)
            first, second = pair
            name = f"{seen.test.removeprefix('test_').replace('.py', '')}, {_called(first)}"
            name += "" if second is None else f" and {_called(second)}"
            yield Case(
                f"{name} {len(done)}", _copied(seen.base), _copied(first), found, False, second and _copied(second)
            )


def _of_a_table(item: pytest.Item) -> bool:
    return any(name in getattr(getattr(item, "callspec", None), "params", {}) for name in TABLES)


def _watched(watch: Watch) -> Any:
    """Patches of PEFT and of transformers, to be undone after the tests."""
    stack = _Patches()
    for cls in (PeftModel, PeftMixedModel):
        stack.wrap(cls, "__init__", _keeping(watch, cls.__init__))
        stack.wrap(cls, "add_adapter", _adding(cls.add_adapter))
    for name, cls in vars(transformers.models.auto.modeling_auto).items():
        if name.startswith("AutoModel") and "from_pretrained" in vars(cls):
            stack.wrap(cls, "from_pretrained", classmethod(_small))
    stack.wrap(transformers.AutoTokenizer, "from_pretrained", MagicMock())
    return stack


class _Patches:
    def __init__(self) -> None:
        self.all: list[Any] = []

    def wrap(self, where: Any, name: str, by: Any) -> None:
        self.all.append(patch.object(where, name, by))

    def __enter__(self) -> None:
        for p in self.all:
            p.start()

    def __exit__(self, *_: object) -> None:
        for p in self.all:
            p.stop()


def _keeping(watch: Watch, init: Callable[..., None]) -> Callable[..., None]:
    def made(self: Any, model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        plain = not any(isinstance(m, (BaseTunerLayer, PeftModel)) for m in model.modules())
        small = sum(p.numel() for p in model.parameters()) < 1_000_000
        before = (_running(copy.deepcopy(model).eval()), copy.deepcopy(peft_config)) if plain and small else None
        init(self, model, peft_config, *args, **kwargs)
        if before is not None:
            watch.made(self, *before)

    return made


def _adding(add: Callable[..., None]) -> Callable[..., None]:
    def added(self: Any, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        add(self, adapter_name, peft_config, *args, **kwargs)
        if hasattr(self, "_seen"):
            self._seen.configs.append(copy.deepcopy(peft_config))

    return added


def _small(cls: Any, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """In place of a model from the hub: one with fresh weights."""
    for part, (config, options) in HUB.items():
        if part in str(name).lower().replace("-", "").replace("_", ""):
            labels = {"num_labels": kwargs["num_labels"]} if "num_labels" in kwargs else {}
            out: nn.Module = cls.from_config(getattr(transformers, config)(**options, **labels))
            return out.eval()
    raise OSError(f"{name}: there is no small model in its place")


class _InOrder(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        for layer in self.children():
            X = layer(X)
        return X


def _running(base: nn.Module) -> nn.Module:
    """Some of the tests' models are never called, and have no forward: their layers run in order."""
    if type(base).forward is nn.Module.forward:
        base.__class__ = type(type(base).__name__, (type(base), _InOrder), {"forward": _InOrder.forward})
    return base


def _named(base: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    given = {k: v for k, v in kwargs.items() if k not in ("adapter_names", "alora_offsets", "labels")}
    bound = inspect.signature(base.forward).bind(*args, **given).arguments
    return {k: v.detach().clone() for k, v in {**bound, **bound.pop("kwargs", {})}.items() if isinstance(v, Tensor)}


def _usual(base: nn.Module) -> dict[str, Tensor]:
    """Inputs for a model that no test calls, as its first layer takes them; none if it runs with none of ours."""
    first = next((m for m in base.modules() if type(m) in SIZES), None)
    name = next(iter(inspect.signature(base.forward).parameters), "")
    shape = SIZES[type(first)](first) if first is not None else [1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tries = [{"input_ids": IDS}, {"input_ids": IDS[:1]}, {"input_ids": IDS, "decoder_input_ids": IDS}]
    tries += [{name: x}, {name: IDS}, {"pixel_values": torch.randn(2, 3, 32, 32)}]
    return next((t for t in tries if _runs(base, t)), {})


def _runs(base: nn.Module, inputs: dict[str, Tensor]) -> bool:
    try:
        with torch.no_grad():
            return bool(inputs) and output(base(**inputs)).isfinite().all().item()
    except Exception:
        return False


def _shapes(model: nn.Module) -> list[Any]:
    return [type(model).__name__, *((n, list(p.shape), str(p.dtype)) for n, p in model.named_parameters())]


def _settings(config: PeftConfig | None) -> Any:
    """What is not the same for all of a test's adapters."""
    given = {} if config is None else config.to_dict()
    return {k: sorted(map(str, v)) if isinstance(v, set) else v for k, v in given.items() if k not in COMMON}


def _called(config: PeftConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def _copied(value: Any) -> Callable[[], Any]:
    return partial(copy.deepcopy, value)
