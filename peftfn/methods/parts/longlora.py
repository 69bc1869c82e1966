"""LongLoRA: the rules that train a LoRA on attention, and embeddings and norms in full."""

from peftfn.core.method import Method
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.lora import LoRA


def longlora(method: Method | None = None, targets: str = "[qkvo]_proj", full: str = "embed|norm") -> dict[str, Method]:
    """Return rules for `adapt` that train a low-rank method on attention, and embeddings and norms in full.

    Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", 2023, arXiv:2309.12307. The
    paper's shifted sparse attention changes the model's attention in training, not a weight; it is not included.

    Args:
        method: the low-rank method; None is `LoRA()`.
        targets: regular expression, searched in the names of parameters: where `method` acts.
        full: regular expression: where `Full` acts.

    Returns:
        Two rules.

    Example:
        rules = pf.longlora(pf.LoRA(rank=16))
        assert list(rules) == ["[qkvo]_proj", "embed|norm"]
    """
    return {targets: LoRA() if method is None else method, full: Full()}
