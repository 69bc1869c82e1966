"""The tables of PEFT's tests, from its source distribution: a model, a configuration, and inputs."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from peft import PeftConfig
from torch import Tensor, nn
from transformers import Trainer  # noqa: F401  (before the stand-ins below: it asks which packages there are)

NOT_NEEDED = ("diffusers", "datasets", "parameterized")  # what PEFT's tests import, and their tables do not use
IDS, MASK = torch.tensor([[4, 5, 3], [6, 2, 7]]), torch.tensor([[1, 1, 1], [1, 1, 1]])  # no token that pads
SMALL: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
BERT = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64}
OPT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
GEMMA = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
TRANSFORMERS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "test_decoder_models": {
        "OPT": ("OPTConfig", "OPTForCausalLM", OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": 32}),
        "GPT-2": ("GPT2Config", "GPT2LMHeadModel", GPT),
        "GPT-J": ("GPTJConfig", "GPTJForCausalLM", GPT | {"rotary_dim": 4}),
        "Llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
        "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
        "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    },
    "test_encoder_decoder_models": {
        "T5": ("T5Config", "T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
        "BART": ("BartConfig", "BartForConditionalGeneration", BART),
    },
    "test_feature_extraction_models": {
        "BERT": ("BertConfig", "BertModel", BERT),
        "RoBERTa": ("RobertaConfig", "RobertaModel", BERT),
        "DeBERTa": ("DebertaConfig", "DebertaModel", BERT),
        "DeBERTa v2": ("DebertaV2Config", "DebertaV2Model", BERT),
    },
    "test_seq_classifier": {
        "BERT": ("BertConfig", "BertForSequenceClassification", BERT),
        "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", BERT),
        "Llama": ("LlamaConfig", "LlamaForSequenceClassification", LLAMA | {"pad_token_id": 0}),
    },
}


@dataclass(frozen=True)
class Case:
    """One row of a table: `model()` is the same each time, and in eval mode. A pair of adapters has a second one."""

    name: str
    model: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    inputs: dict[str, Tensor]
    generates: bool = False
    second: Callable[[], PeftConfig] | None = None


def stand_ins(sdist: Path) -> None:
    """Make PEFT's tests importable, also without what they need for other things than ours."""
    if str(sdist) not in sys.path:
        sys.path.insert(0, str(sdist))
        (sdist / "tests" / "__init__.py").touch()
        for package in NOT_NEEDED:
            if importlib.util.find_spec(package) is None:
                sys.modules |= {package: MagicMock(__version__="0"), f"{package}.utils": MagicMock()}
    sys.modules.pop("tests", None)


def table(sdist: Path, name: str) -> ModuleType:
    """A module of PEFT's tests. sdist: the unpacked source distribution."""
    stand_ins(sdist)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"tests.{name}")


def cases(sdist: Path) -> Iterator[Case]:
    """Every row of the tables of custom models, decoders, encoder–decoders, encoders and classifiers."""
    custom = table(sdist, "test_custom_models")
    inputs = {"X": torch.arange(90).view(9, 10)}
    for name, model, cls, options in custom.TEST_CASES:
        make = lambda model=model: custom.MockTransformerWrapper.from_pretrained(model).eval()  # noqa: E731
        yield Case(f"custom: {name}", make, _config(cls, options, "custom"), inputs)
    for module, models in TRANSFORMERS.items():
        for kind, made in models.items():
            encoders = {"decoder_input_ids": IDS} if module == "test_encoder_decoder_models" else {}
            inputs = {"input_ids": IDS, "attention_mask": MASK, **encoders}
            generates = module in ("test_decoder_models", "test_encoder_decoder_models")
            for i, (cls, options) in enumerate(table(sdist, module).ALL_CONFIGS):
                what = f"{module.removeprefix('test_')}: {kind}, {cls.__name__.removesuffix('Config')} {i}"
                yield Case(what, lambda made=made: _made(*made), _config(cls, options, kind), inputs, generates)


def _config(cls: Any, options: dict[str, Any], base: str) -> Callable[[], PeftConfig]:
    def make() -> PeftConfig:
        given = {"total_step": 1} if cls.__name__ == "AdaLoraConfig" else {}
        out: PeftConfig = cls(base_model_name_or_path=base, **(given | dict(options)))
        return out

    return make


def _made(config: str, model: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    out: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return out.eval()
