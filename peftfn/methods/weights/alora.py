"""aLoRA: W x + s·B A x for the tokens from an invocation on, and W x for those before it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from peftfn.core.method import LINEAR, Cases, Leaf
from peftfn.methods.parts.lowrank import LORA
from peftfn.methods.weights.lora import LoRA
from peftfn.tensors.sequence import from_last


@dataclass(frozen=True)
class ALoRA(LoRA):
    """W x + s·B A x for each token from the `invocation` on, W x for those before it; s as for `LoRA`.

    Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025, arXiv:2504.12397. Each call looks for the
    last occurrence of the invocation in each row of its token ids; on a row without it, the base acts. So there is no
    merge.

    Trainable parameters per site: rank·(in + out). Use it to change the task in the middle of a text, and keep the
    keys and values that the base has cached for what came before.

    Args:
        rank, alpha, rslora, dropout, lora_bias, init_weights: as for `LoRA`.
        invocation: the ids of the tokens that activate it.

    Raises:
        ValueError: the invocation is empty, or has something else than token ids.

    Example:
        method = pf.ALoRA(rank=2, invocation=(3, 4))
        net = pf.adapt(torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 6)), {"1.weight": method})
        y = net.apply(net.init(), torch.tensor([[5, 3, 4, 6]]))  # it acts on the last three tokens
    """

    cases: ClassVar[Cases] = (
        {"rank": 2, "alpha": 3.0, "invocation": (3, 4)},
        {"rank": 3, "rslora": True, "init_weights": "random", "invocation": (5,)},
    )
    kinds = LINEAR - {"stack", "stack_t"}
    mergeable = False

    peft = replace(
        LORA,
        keys={**LORA.keys, "beta": "lora_B.bias"},
        fields={**LORA.fields, "lora_bias": "lora_bias", "invocation": "alora_invocation_tokens"},
        fixed={"alora_invocation_tokens": ...},
    )

    invocation: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        some = tuple(self.invocation) if isinstance(self.invocation, Iterable) else ()
        if not some or not all(type(t) is int and t >= 0 for t in some):
            raise ValueError(f"ALoRA.invocation is {self.invocation!r}; give a tuple of one or more token ids >= 0")
        object.__setattr__(self, "invocation", some)

    def acts_on(self, ids: Tensor) -> Tensor:
        return from_last(ids, self.invocation)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        raise ValueError(f"ALoRA acts from the tokens {list(self.invocation)} on, so it is no change of the weight")
