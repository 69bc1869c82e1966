"""OffsetLoRA: W + s·(B A − B₀A₀), started at factors that are given."""

from dataclasses import dataclass

from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.variant import FromWeight


@dataclass(frozen=True)
class OffsetLoRA(FromWeight):
    """W + s·(B A − B₀A₀), with constants A₀ [rank, in] and B₀ [out, rank] from which A and B start, and s as for
    `LoRA`.

    What the functions of `pf.starts` make of a `LoRA` where A and B do not start at B A = 0: the papers subtract
    s·B₀A₀ from the weight, and here it is a constant of the method. `adapt` alone starts like `LoRA`: A₀
    Kaiming-uniform and B₀ zero. `to_lora` makes a LoRA of twice the rank of it, exactly, as PEFT's conversion does.

    Trainable parameters per site: rank·(in + out). Use it through `pf.starts`, for a LoRA that starts at what data or
    gradients say.

    Args:
        rank: inner dimension, at most min(out, in).
        alpha, rslora, dropout: as for `LoRA`; dropout acts on the difference.

    Raises:
        ValueError: a rank above the weight's own.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.corda(net, [torch.randn(16, 8)])
        assert net.plan["weight"].method == pf.OffsetLoRA(rank=2)
    """

    cases = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True})

    def start(self, rng: Rng, w: Tensor) -> Leaf:
        return {"a": rng.kaiming(self.rank, w.shape[1]), "b": rng.zeros(w.shape[0], self.rank)}
