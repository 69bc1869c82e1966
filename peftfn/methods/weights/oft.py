"""OFT: W Rᵀ with R block-diagonal and orthogonal, so that x is rotated before it meets W."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, Probability, Rounds, Start
from peftfn.core.method import Leaf, Product
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.rotation import (
    _Blocks,
    blocks_read,
    blocks_written,
    bounded,
    cayley,
    dropped,
    enough,
    neumann,
    places,
    skew,
    turn,
)


def _read(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    eps = config.get("eps", 6e-5) if config.get("coft") else None
    side = "output" if config.get("kind") == "embedding" else "input"
    return blocks_read(fields, config) | {"eps": eps, "side": side, "nearest": True}


@dataclass(frozen=True)
class OFT(_Blocks):
    """W Rᵀ: block i of x becomes x_i R_i, with R_i the Cayley transform of a skew-symmetric Q_i = U_i − U_iᵀ.

    Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, arXiv:2306.07280, in the
    input-centric form of arXiv:2506.19847. Trained: the upper triangles q [blocks, h(h−1)/2], row by row.

    exact: R = (I − Q)(I + Q)⁻¹. Otherwise PEFT's series, which approximates the inverse of that (so a checkpoint
    belongs to one of the two): R = I + 2Q + 2Q² + … with `terms` terms, the last one counted once. Convolutions
    rotate the flattened window as merging does; PEFT's own forward differs from its merge there.

    Trainable parameters per site: in·(block_size − 1)/2. Use it to keep what the model knows: the angles between
    neurons stay.

    Args:
        block_size: h, size of a block, or
        blocks: number of blocks; give at most one of the two (none is block_size 32). It must divide the rotated side.
        share: one rotation for all blocks.
        exact: solve for the Cayley transform instead of its Neumann series.
        terms: of the series, at least 2; the error falls with ‖Q‖^terms.
        eps: if given, keep ‖Q_i‖_F ≤ eps/√(blocks trained) (COFT), by scaling Q_i down before it is used.
        side: "input" rotates x; "output" rotates the product's rows, y R, as PEFT does for embeddings.
        nearest: where the block size, or the number, does not divide the rotated side, take the nearest that does, the
            smaller of two, as PEFT does without being asked.
        dropout: share of the blocks that do not turn in train mode, drawn anew each call: int(dropout·blocks) of them.
            A shared block always turns. (PEFT's module_dropout.)
        init_weights: "default" (q zero) or "random" (q normal with std 0.1: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.OFT(block_size=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"block_size": 2},
        {"blocks": 2, "exact": True, "share": True, "init_weights": "random"},
        {"block_size": 3, "nearest": True, "terms": 3, "eps": 0.5},
        {"blocks": 2, "side": "output", "dropout": 0.5},
    )

    peft = Peft(
        "OFT",
        {"q": "oft_R.weight"},
        {
            "block_size": "oft_block_size",
            "blocks": "r",
            "share": "block_share",
            "exact": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
            "dropout": "module_dropout",
        },
        {"exact": [(True, False), (False, True)]},
        reads=_read,
        writes=lambda m: blocks_written(m) | ({} if m.eps is None else {"coft": True, "eps": m.eps}),
        leaf_to=lambda m, p: {"oft_R.weight" if m.side == "input" else "oft_embedding_R.weight": p["q"]},
    )
    default_size = 32

    share: bool = False
    exact: bool = False
    terms: Rounds = 5
    eps: Positive | None = None
    side: Literal["input", "output"] = "input"
    nearest: bool = False
    dropout: Probability = 0.0
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        enough(self)

    def block(self, size: int, side: str) -> int:
        if not self.nearest:
            return super().block(size, side)
        wanted = self.blocks or self.block_size or self.default_size
        n = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
        return size // n if self.blocks else n

    def _block(self, w: Tensor) -> int:
        return self.block(w.shape[1 if self.side == "input" else 0], self.side)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        h = self._block(w)
        shape = 1 if self.share else w.shape[1 if self.side == "input" else 0] // h, h * (h - 1) // 2
        return {"q": rng.zeros(*shape) if self.identity else rng.normal(*shape, std=0.1)}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {"at": places(self._block(w)).to(rng.device)}

    def indices(self, p: Leaf, w: Tensor) -> Leaf:
        return {"at": places(self._block(w))}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        q = skew(p["q"], p["at"])
        if self.eps is not None:
            q = bounded(q, self.eps / len(q) ** 0.5, (1, 2))
        return {"r": dropped(cayley(-q) if self.exact else neumann(q, self.terms), self.dropout)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return (turn(w, p["r"].mT) if self.side == "input" else turn(w.mT, p["r"]).mT) - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, turn(w, p["r"].mT)) if self.side == "input" else turn(dot(x, w), p["r"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(turn(x, p["r"]), w) if self.side == "input" else turn(F.linear(x, w), p["r"])
