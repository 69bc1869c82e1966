"""SuperTuning: W + v at the places of W's largest entries, beside an optional LoRA ("Supra")."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt, Probability
from peftfn.core.method import Index, Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.weights.shira import added


@dataclass(frozen=True)
class SuperTuning(Weight):
    """W + S + s·B A, S zero but for v [n] where |W| is largest, n = ⌊(1 − sparsity)·in·out⌋; s = alpha/rank.

    Super and Supra of PEFT 0.21. The places are a constant of the site, found once in the weight `adapt` was given.

    Trainable parameters per site: (1 − sparsity)·in·out + rank·(in + out). Use it for sparse changes of the entries
    that weigh most.

    Args:
        sparsity: share of the weight that stays, 0 ≤ sparsity < 1.
        select_top: take the largest entries by magnitude; otherwise the smallest.
        rank: of the LoRA beside it, A [rank, in] and B [out, rank]; None for none.
        alpha: numerator of its scale; None means 2·rank, so s = 2.
        dropout: probability of dropping an input feature of the LoRA in train mode; embeddings have none to drop.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.SuperTuning(sparsity=0.8, rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    per_row = False
    scales_with = ("v", "sb")
    cases = ({"sparsity": 0.6}, {"sparsity": 0.8, "select_top": False, "rank": 2, "alpha": 3.0})

    peft = Peft(
        "SUPERTUNING",
        {
            "v": "supertuning_values",
            "at": "supertuning_indices",
            "a": "supertuning_lora_A.weight",
            "b": "supertuning_lora_B.weight",
        },
        {
            "sparsity": "sparsity",
            "select_top": "select_top",
            "rank": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
        },
        reads=lambda fields, config: {k: v for k, v in fields.items() if v is not None},
        writes=lambda m: {"lora_alpha": m.alpha if m.rank is None or m.alpha is not None else 2 * m.rank},
        leaf_to=lambda m, p: m.peft.named({k: t if t.is_floating_point() else t.int() for k, t in p.items()}),
    )

    sparsity: Probability = 0.99
    select_top: bool = True
    rank: PositiveInt | None = None
    alpha: Positive | None = None
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and self.alpha is not None:
            raise ValueError(f"SuperTuning.alpha is {self.alpha} without a rank; it scales the LoRA: give its rank too")

    def count(self, w: Tensor) -> int:
        n = int(w.numel() * (1 - self.sparsity))
        if not n:
            raise ValueError(
                f"SuperTuning.sparsity is {self.sparsity}, which leaves none of {w.numel()} entries: choose at most "
                f"{1 - 1 / w.numel():.6f}"
            )
        return n

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {"at": w.abs().flatten().topk(self.count(w), largest=self.select_top).indices}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {"at": Index(w.numel(), distinct=True)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r = w.shape, self.rank
        leaf = {"v": rng.zeros(self.count(w))}
        return leaf if r is None else leaf | {"a": rng.kaiming(r, in_), "b": rng.zeros(out, r)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        if self.rank is None:
            return p
        scale = 2.0 if self.alpha is None else self.alpha / self.rank
        return {"v": p["v"], "at": p["at"], "a": p["a"], "sb": scale * p["b"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        d = p["v"].new_zeros(w.numel()).scatter(0, p["at"], p["v"]).view(w.shape)
        return d + p["sb"] @ p["a"] if "sb" in p else d

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        y = dot(x, added(w, p["at"], p["v"]))
        if "sb" not in p:
            return y
        return y + F.linear(dot(self.dropped(x), p["a"]), p["sb"])
