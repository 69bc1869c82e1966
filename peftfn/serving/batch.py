"""A running batch: the keys and values of every row side by side in one cache, so that rows join and leave at any step.

The tokens of a row end where the cache ends; a shorter row has padding in front, which the mask hides. So one step of
all rows is one forward pass, and what a row gets does not depend on who stands beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.tensors.cache import cache_name

Run = Callable[..., Any]
"""Runs the model on a batch by arguments of its forward: with an adapter for each row, or without any."""


@dataclass
class Batch:
    """The rows of one cache. `lengths`: the tokens of each row, without padding."""

    cache: Any = None
    lengths: list[int] = field(default_factory=list)

    def join_(self, other: "Batch") -> None:
        """Take in the rows of another batch, behind these."""
        if not other.lengths:
            return
        if not self.lengths:
            self.cache, self.lengths = other.cache, other.lengths
            return
        size = max(max(self.lengths), max(other.lengths))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_sized(mine.keys, size), _sized(theirs.keys, size)])
            mine.values = torch.cat([_sized(mine.values, size), _sized(theirs.values, size)])
        self.lengths = self.lengths + other.lengths

    def keep_(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, and no padding that all of them have."""
        if not rows:
            self.cache, self.lengths = None, []
        elif list(rows) != list(range(len(self.lengths))):
            self.lengths = [self.lengths[i] for i in rows]
            for layer in self.cache.layers:
                at = torch.tensor(rows, device=layer.keys.device)
                layer.keys = _sized(layer.keys[at], max(self.lengths))
                layer.values = _sized(layer.values[at], max(self.lengths))


def _sized(x: Tensor, size: int) -> Tensor:
    """x [rows, heads, tokens, head size] with padding in front added or taken off, so that it has `size` tokens."""
    more = size - x.shape[2]
    return F.pad(x, (0, 0, more, 0)) if more > 0 else x[:, :, -more:]


class Stepper:
    """Forward passes of a causal language model over a `Batch`.

    Raises:
        TypeError: the model is none of transformers' that generate by a decoder.
        ValueError: its cache is more than keys and values of all tokens, or rows with padding in front get other
            logits than alone.
    """

    def __init__(self, model: nn.Module):
        config, forward = getattr(model, "config", None), getattr(model, "forward", None)
        names = set(signature(forward).parameters) if forward is not None else set()
        cache = cache_name(names)
        if config is None or not {"input_ids", "attention_mask", cache} <= names:
            raise TypeError(f"serve: {type(model).__name__} is none of transformers' causal language models")
        if config.is_encoder_decoder:
            raise TypeError(f"serve: {type(model).__name__} has an encoder; serve runs decoders alone")
        self.model, self._cache, self._one = model, cache, "logits_to_keep" in names
        for self._positions in dict.fromkeys(["position_ids" in names, False]):
            if self.agrees(model):
                return
        raise ValueError(
            f"serve: rows of {type(model).__name__} with padding in front get other logits than alone: answer one "
            "request at a time with net.apply(…, method='generate')"
        )

    def prefill(self, prompts: Sequence[Sequence[int]], run: Run) -> tuple[Tensor, Batch]:
        """(logits [rows, vocabulary] after each prompt, the batch of these rows)."""
        from transformers import DynamicCache

        size = max(map(len, prompts))
        ids = torch.zeros(len(prompts), size, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[size - len(prompt) :] = torch.tensor(prompt)
        batch = Batch(DynamicCache(), [len(p) for p in prompts])
        return self._forward(ids, batch, run), batch

    def step_(self, batch: Batch, tokens: Sequence[int], run: Run) -> Tensor:
        """Logits [rows, vocabulary] after one more token of each row."""
        batch.lengths = [n + 1 for n in batch.lengths]
        return self._forward(torch.tensor(tokens)[:, None], batch, run)

    def _forward(self, ids: Tensor, batch: Batch, run: Run) -> Tensor:
        device = next(self.model.parameters()).device
        n, size = torch.tensor(batch.lengths)[:, None], max(batch.lengths)
        place = torch.arange(size) - (size - n)  # [rows, size]: negative in the padding
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": (place >= 0).long().to(device)}
        if self._positions:
            inputs["position_ids"] = place[:, size - ids.shape[1] :].clamp(min=0).to(device)
        if self._one:
            inputs["logits_to_keep"] = 1
        out = run(**inputs, **{self._cache: batch.cache}, use_cache=True)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _unlike(self) -> ValueError:
        return ValueError(
            f"serve: the cache of {type(self.model).__name__} is more than keys and values of all tokens, so rows "
            "cannot join and leave it: answer one request at a time with net.apply(…, method='generate')"
        )

    def agrees(self, run: Run) -> bool:
        """Whether rows side by side, one step after the other, have the logits of a pass for each row alone.

        Raises:
            ValueError: the cache is more than keys and values of all tokens.
        """
        from transformers.cache_utils import DynamicLayer

        size = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        rows = [[(7 * i + 3) % size for i in range(n)] for n in (2, 5)]
        with torch.inference_mode():
            try:
                _, batch = self.prefill([row[:-1] for row in rows], run)
            except IndexError:  # it wants layers of another kind than a cache makes while it grows
                raise self._unlike() from None
            plain = [type(layer) is DynamicLayer for layer in batch.cache.layers]
            shapes = [layer.keys.shape[2] == layer.values.shape[2] == 4 for layer in batch.cache.layers]
            if not plain or not all(plain + shapes):
                raise self._unlike()
            got = self.step_(batch, [row[-1] for row in rows], run)
            alone = [run(input_ids=torch.tensor([row], device=got.device)).logits[:, -1] for row in rows]
            want = torch.cat(alone).float()
        tolerance = 1e-3 if next(self.model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
        return bool((got - want).abs().max() <= tolerance * want.abs().max())
