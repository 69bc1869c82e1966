"""VB-LoRA: W + B A, whose rows and columns are softmax mixtures of vectors from one trained bank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability, divides
from peftfn.core.method import Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored


@dataclass(frozen=True)
class VBLoRA(Factored):
    """W + B A, where every piece of `length` numbers of A's rows and B's columns is Σ_k softmax(top-k logits)_k V[k].

    Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024, arXiv:2405.15179.
    A rule's sites share the bank V [vectors, length]; each has logits la [rank, in/length, vectors] for A [rank, in]
    and lb [out/length, rank, vectors] for B [out, rank]. A fresh adapter is not the identity but small: at V = 0, the
    only start that would be, every gradient is zero. V is drawn once (PEFT draws it anew for every layer).

    Trainable parameters per site: rank·vectors·(in + out)/length, and vectors·length shared. Use it for small files,
    which need only the top logits and the bank.

    Args:
        rank: inner dimension of the product; values above min(out, in) are allowed.
        vectors: of the bank.
        length: of a vector of the bank; it must divide in and out.
        topk: vectors mixed for one piece.
        dropout: probability of dropping an input feature of A in train mode.
        bank_bound: V starts as U(−bank_bound, bank_bound).
        logits_std: logits start as N(0, logits_std²).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.VBLoRA(rank=2, vectors=8, length=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "vectors": 5, "length": 2, "bank_bound": 1.0},
        {"rank": 3, "vectors": 4, "length": 1, "topk": 3, "logits_std": 0.5},
    )

    peft = Peft(
        "VBLORA",
        {"la": "vblora_logits_A", "lb": "vblora_logits_B"},
        {
            "rank": "r",
            "vectors": "num_vectors",
            "length": "vector_length",
            "topk": "topk",
            "dropout": "vblora_dropout",
            "bank_bound": "init_vector_bank_bound",
            "logits_std": "init_logits_std",
        },
        shared={"bank": "vblora_vector_bank"},
    )

    rank: PositiveInt = 4
    vectors: PositiveInt = 256
    length: PositiveInt = 256
    topk: PositiveInt = 2
    dropout: Probability = 0.0
    bank_bound: float = 0.02
    logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.vectors:
            raise ValueError(f"VBLoRA.topk is {self.topk}; the bank has {self.vectors} vectors: give topk <= vectors")

    @property
    def identity(self) -> bool:
        return False

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        return {"bank": rng.uniform(self.vectors, self.length, bound=self.bank_bound)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, in_ = w.shape
        divides(self, "length", self.length, out=out, **{"in": in_})
        la = rng.normal(self.rank, in_ // self.length, self.vectors, std=self.logits_std)
        return {"la": la, "lb": rng.normal(out // self.length, self.rank, self.vectors, std=self.logits_std)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        def mixtures(logits: Tensor) -> Tensor:
            top, k = logits.topk(self.topk)
            return (torch.softmax(top, -1).unsqueeze(-1) * F.embedding(k, p["bank"])).sum(-2)

        # [rank, in/length, length] and [out/length, rank, length]
        return {"down": mixtures(p["la"]).flatten(1), "up": mixtures(p["lb"]).mT.flatten(0, 1)}
