"""A kind's name → a `Subject`: the model, inputs that it takes, and how to take one row of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from .inputs import ROWS, Inputs, inputs_of, run, tensors
from .rows import GIVEN, MADE, Made
from .shrink import small

LARGEST = 32_000_000  # parameters
HEADS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "MASKED_LM", "CTC"),
    *("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    "IMAGE_CLASSIFICATION",
    *("SEMANTIC_SEGMENTATION", "MASK_GENERATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION"),
    *("ZERO_SHOT_OBJECT_DETECTION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "TIME_SERIES_PREDICTION"),
    "PRETRAINING",
)
"""Which class of an architecture is built: the one that people train most comes first."""
Cut = Callable[[Inputs, int], Inputs]


class NoModel(Exception):
    """The kind cannot be built, or its outputs cannot be compared."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One model in eval mode, which no check calls or adapts itself: each takes a copy."""

    kind: str
    model: nn.Module
    inputs: Inputs
    cut: Cut | None
    """The inputs of one row; None: they have no rows."""
    generates: bool


def kinds() -> list[str]:
    """All that there is something to build for: what `rows` makes by hand, and each architecture of transformers."""
    return [*MADE, *(k for k in configuration_auto.CONFIG_MAPPING_NAMES if head(k) is not None)]


def head(kind: str) -> Any:
    """The class of transformers to build for a kind, None if it has none that `HEADS` knows."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{h}_MAPPING_NAMES", {}) for h in HEADS]
    for name, table in [*zip(HEADS, tables, strict=True), ("", modeling_auto.MODEL_MAPPING_NAMES)]:
        twice = name == "CAUSAL_LM" and kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if kind in table and not twice:
            found = table[kind] if isinstance(table[kind], str) else table[kind][0]
            return getattr(transformers, found, None)
    return None


def subject(kind: str) -> Subject:
    """Raises: whatever stands in the way of building it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MADE[kind]() if kind in MADE else architecture(kind)
    model, inputs = made.model.eval(), made.inputs
    with torch.no_grad():
        first, second = (tensors(run(copy.deepcopy(model), inputs)) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise NoModel("two calls with one seed differ")
    cut = (made.cut or rows_first) if made.rows else None
    return Subject(kind, model, inputs, cut, made.generates and _can_generate(model))


def rows_first(inputs: Inputs, i: int) -> Inputs:
    def row(v: Any) -> Any:
        return v[i : i + 1] if isinstance(v, torch.Tensor) and v.dim() and len(v) == ROWS else v

    return {k: row(v) for k, v in inputs.items()}


def _can_generate(model: nn.Module) -> bool:
    return hasattr(model, "generate") and bool(getattr(type(model), "can_generate", lambda: False)())


def architecture(kind: str) -> Made:
    """What the configuration's own fields need comes from `rows.GIVEN`; layers in multiples of four where two fail."""
    given, made_by = GIVEN.get(kind, ({}, None))
    try:
        return _architecture(kind, given, made_by)
    except Exception as e:
        if "get_seq_length" not in str(e) or given:  # a pattern of layers whose first of a sort lies further on
            raise
        for field in ("num_hidden_layers", "text_config.num_hidden_layers"):
            for n in (4, 8):
                try:
                    return _architecture(kind, {field: n}, made_by)
                except Exception:
                    continue
        raise


def _architecture(kind: str, given: dict[str, Any], made_by: Callable[[nn.Module], Made] | None) -> Made:
    cls = head(kind)
    config = small(configuration_auto.CONFIG_MAPPING[kind], given)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise NoModel(f"{size / 1e6:.0f}M parameters after shrinking")
    torch.manual_seed(0)
    model = lively_(cls(config).eval().float())
    told = getattr(model, "generation_config", None)
    if told is not None:
        told.pad_token_id = 0 if told.pad_token_id is None else told.pad_token_id
        if getattr(model.config, "is_encoder_decoder", False) and told.decoder_start_token_id is None:
            told.decoder_start_token_id = 1
    return made_by(model) if made_by else Made(model, inputs_of(model))


def lively_(model: nn.Module) -> nn.Module:
    """Without dropout, and with weights so large that outputs differ; what was left uninitialised is drawn."""
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.p = 0.0
        for k in [k for k, v in vars(m).items() if type(v) is float and ("drop" in k)]:
            setattr(m, k, 0.0)
    with torch.no_grad():
        buffers = [(n, b) for n, b in model.named_buffers() if "mask" not in n and "inv_freq" not in n]
        for _, t in [*model.named_parameters(), *buffers]:
            if t.is_floating_point() and t.numel() and not (t.abs() < 1e4).all():
                t.copy_(0.05 * torch.randn(t.shape, generator=g))
        for p in model.parameters():
            if p.is_floating_point() and p.dim() > 1 and p.numel() > 4 and 0 < p.std() < 0.05:
                p.mul_(0.1 / p.std())
    return model
