"""LongLoRA: the rules that train a LoRA on attention, and embeddings and norms in full."""

from peftfn.core.method import Method
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.lora import LoRA


def longlora(method: Method | None = None, targets: str = "[qkvo]_proj", full: str = "embed|norm") -> dict[str, Method]:
    """Rules for `adapt`: `method` (by default `LoRA()`) where `targets` is found in a parameter's name, `Full` where
    `full` is.

    Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", 2023, arXiv:2309.12307. The
    paper's shifted sparse attention is a change of the model's attention in training, not of a weight; not part of it.
    """
    return {targets: LoRA() if method is None else method, full: Full()}
