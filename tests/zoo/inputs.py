"""Inputs that a model takes, found by trying: what its forward's parameters allow, in an order of likelihood."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCAB = 5, 6, 80
PARTS = (
    *("text_config", "thinker_config", "vision_config", "encoder", "decoder", "audio_config"),
    *("audio_encoder", "text_encoder"),
)
Inputs = dict[str, Any]


class NoInput(Exception):
    """Nothing that was tried is an input of the model."""


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's output, the same each time: some draw numbers in eval mode too."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return model(**inputs)


def tensors(out: Any) -> list[Tensor]:
    """The floating tensors of an output, in order, without caches."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() or out.is_complex() else []
    if isinstance(out, Mapping):
        return [t for k, v in out.items() if not _cache(str(k)) for t in tensors(v)]
    if isinstance(out, list | tuple):
        return [t for v in out for t in tensors(v)]
    return tensors(out.sample) if isinstance(getattr(out, "sample", None), Tensor) else []


def _cache(key: str) -> bool:
    return bool(re.search(r"past_key|cache|state", key)) and not key.endswith("hidden_state")


def inputs_of(model: nn.Module) -> Inputs:
    """The first candidate for which the output is finite."""
    errors = []
    for inputs in candidates(model):
        try:
            return fitted(model, inputs)
        except Exception as e:
            errors.append(f"{'+'.join(inputs)}: {type(e).__name__}: {str(e)[:120]}")
    raise NoInput(" | ".join(errors[:4]))


def fitted(model: nn.Module, inputs: Inputs) -> Inputs:
    """`inputs`, with as many image or audio tokens among the text as the model says that it has features."""
    for _ in range(3):
        try:
            with torch.no_grad():
                out = tensors(run(copy.deepcopy(model), inputs))
        except Exception as e:
            inputs = _with_tokens(model, inputs, e)
            continue
        if not out or not all(t.isfinite().all() for t in out):
            raise NoInput("the output has no floats, or not finite ones")
        return inputs
    raise NoInput("the number of image tokens is never right")


def _with_tokens(model: nn.Module, inputs: Inputs, error: Exception) -> Inputs:
    told = re.search(
        r"tokens: (?:tensor\()?(\d+)\)?, features:? (\d+)|n_image_tokens=(\d+).*n_image_features=(\d+)", str(error)
    )
    if not told or "input_ids" not in inputs:
        raise error
    audio = "input_features" in inputs or "udio" in str(error)
    names = ("audio_token_id", "audio_token_index") if audio else ("image_token_id", "image_token_index")
    token, features = field(model.config, *names), int(told[2] or told[4])
    if token is None or features % ROWS:
        raise error
    ids = inputs["input_ids"][:, :LENGTH]
    ids = torch.where(ids == token, 5, ids)
    ids = torch.cat([ids[:, :2], torch.full((ROWS, features // ROWS), token), ids[:, 2:]], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def field(config: Any, *names: str) -> int | None:
    """The first of the names that the configuration or one of its parts has, as a number."""
    for name in names:
        for c in [config, *(getattr(config, part, None) for part in PARTS)]:
            value = getattr(c, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if type(value) is int:
                return value
    return None


def ids(length: int = LENGTH, *, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """[rows, length]: token ids that are not special"""
    return torch.randint(4, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Text with pictures, sounds, pictures, videos, text, series: whatever the forward has parameters for."""
    takes = inspect.signature(model.forward).parameters
    text = _text(model, takes)
    answer = {"decoder_input_ids": ids(4, seed=1)} if "decoder_input_ids" in takes else {}
    pictures = list(_pictures(model)) if "pixel_values" in takes else []
    if text:
        yield from ({**text, **p} for p in pictures)
    for sound in _sounds(model, takes):
        yield {**sound, **answer}
        if text and "input_features" in sound:
            yield {**sound, **text}
        yield sound
    if answer:
        yield from ({**p, **answer} for p in pictures)
    yield from pictures
    if "pixel_values_videos" in takes:
        yield {"pixel_values_videos": noise(ROWS, 4, _channels(model), _size(model), _size(model))}
    if text:
        yield {**text, **answer}
        yield text
    if "past_values" in takes:
        yield _series(model)
    if "inputs" in takes:
        yield {"inputs": ids()}
    if "hidden_states" in takes:
        yield {"hidden_states": noise(ROWS, LENGTH, field(model.config, "hidden_size", "d_model") or 32)}
    if "x" in takes:
        yield {"x": noise(ROWS, _channels(model), _size(model), _size(model))}
    if "audio_codes" in takes:
        yield {"audio_codes": ids()[:, None].repeat(1, 4, 1)}


def _text(model: nn.Module, takes: Mapping[str, Any]) -> Inputs:
    if "input_ids" not in takes:
        return {}
    out = {"input_ids": ids(vocab=min(field(model.config, "vocab_size") or 64, VOCAB))}
    if "attention_mask" in takes:
        out["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "qformer_input_ids" in takes:
        out |= {"qformer_input_ids": ids(seed=2), "qformer_attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}
    if "bbox" in takes:
        out["bbox"] = ids(1, vocab=20).unsqueeze(-1).expand(ROWS, LENGTH, 4).contiguous()
    return out


def _vision(model: nn.Module) -> Any:
    return getattr(model.config, "vision_config", None) or model.config


def _channels(model: nn.Module) -> int:
    return field(_vision(model), "num_channels", "in_channels", "in_chans") or 3


def _size(model: nn.Module) -> int:
    return field(_vision(model), "image_size", "input_size") or field(model.config, "image_size") or 32


def _pictures(model: nn.Module) -> Iterator[Inputs]:
    c, s = _channels(model), _size(model)
    for shape in ((c, s, s), (2, c, s, s), (c, 64, 64), (1, c, s, s)):
        yield {"pixel_values": noise(ROWS, *shape)}


def _sounds(model: nn.Module, takes: Mapping[str, Any]) -> Iterator[Inputs]:
    part = getattr(model.config, "audio_config", None) or model.config
    bins = (
        field(part, "feature_projection_input_dim", "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel")
        or 16
    )
    if "input_features" in takes:
        yield from ({"input_features": noise(ROWS, *s)} for s in ((bins, 64), (bins, 128), (64, bins), (1, 64, bins)))
    if "input_values" in takes:
        yield from ({"input_values": noise(ROWS, *s)} for s in ((1600,), (1, 1600), (64, bins)))


def _series(model: nn.Module) -> Inputs:
    length = field(model.config, "context_length") or 32
    return {"past_values": noise(ROWS, length, field(model.config, "num_input_channels") or 1)}
