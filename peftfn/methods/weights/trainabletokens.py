"""TrainableTokens: W with the rows of chosen tokens replaced by trained ones."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class TrainableTokens(Weight):
    """W with row `tokens[i]` replaced by T[i], T [n, dim], which starts as the rows that are there.

    Hugging Face PEFT, 2025 (no paper). Rows are those of an embedding's own weight [vocab, dim], or the outputs of a
    linear layer (a language model's head [vocab, dim]). A head keeps its bias, which PEFT drops.

    Trainable parameters per site: tokens·dim. Use it for new tokens, without training the whole embedding.

    Args:
        tokens: indices of the rows, each once; an index beyond the weight is an error.

    Example:
        net = pf.adapt(torch.nn.Embedding(9, 8), {"weight": pf.TrainableTokens(tokens=(7, 8))})
        y = net.apply(net.init(seed=0), torch.tensor([[1, 7, 8]]))
    """

    kinds = frozenset({"linear", "linear_t", "embedding"})
    absolute = frozenset({"t"})
    cases = ({"tokens": (4, 0)}, {"tokens": (5,)})

    peft = Peft("TRAINABLE_TOKENS", {"t": "trainable_tokens_delta"}, {"tokens": "token_indices"})

    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        some = tuple(self.tokens) if isinstance(self.tokens, Iterable) else ()
        if not some or not all(type(t) is int and t >= 0 for t in some) or len(set(some)) < len(some):
            raise ValueError(
                f"{type(self).__name__}.tokens is {self.tokens!r}; give a tuple of one or more different indices >= 0"
            )
        object.__setattr__(self, "tokens", some)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        rows = self._rows(rng, w)
        if max(self.tokens) >= rows.shape[0]:
            raise ValueError(
                f"TrainableTokens.tokens has {max(self.tokens)}, but the weight has {rows.shape[0]} rows: resize the "
                "model's embeddings first, or give smaller indices"
            )
        return {"t": rows[torch.tensor(self.tokens, device=w.device)].to(rng.dtype)}

    def _rows(self, rng: Rng, w: Tensor) -> Tensor:
        """w [out, in] with a token a row: an embedding is seen as [dim, vocab]."""
        return w.mT if rng.site and rng.site.kind == "embedding" else w

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        if self._rows(rng, w) is w:
            return {"row": torch.tensor(self.tokens, device=w.device)}
        return self._columns(w.shape[1], w.device)

    def _columns(self, vocabulary: int, device: torch.device) -> Leaf:
        index = torch.tensor(self.tokens, device=device)
        slot = torch.full((1, vocabulary), -1, device=device)  # a token's place in T, or −1
        return {"column": index, "slot": slot.index_copy(1, index, torch.arange(len(index), device=device)[None])}

    def indices(self, p: Leaf, w: Tensor) -> Leaf:
        if "row" in p:
            return {"row": torch.tensor(self.tokens)}
        return self._columns(w.shape[1], torch.device("cpu"))

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        dim, name, new = (0, "row", p["t"]) if "row" in p else (1, "column", p["t"].mT)
        return torch.zeros_like(w).index_copy(dim, p[name], new - w.index_select(dim, p[name]))

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if "row" in p:
            return dot(x, w).index_copy(-1, p["row"], dot(x, p["t"]))
        slot = dot(x, p["slot"])  # [..., 1]
        return torch.where(slot < 0, dot(x, w), F.embedding(slot.squeeze(-1).clamp(min=0), p["t"]))

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x, F.linear) if "row" in p else super().product(p, w, x, F.linear)
