"""Layer gate: x + g (y − x), one trained number for a whole layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class LayerGate(ModuleMethod):
    """x + g·(y − x), x the input and y the output of a module of one width; g is one number, which starts at 1.

    Around a layer with a residual connection, g scales what the layer adds: g = 0 leaves the layer out, and more than
    its output, since nothing of it is kept.

    After the gates of Bachlechner et al., "ReZero is All You Need", 2020, arXiv:2003.04887.

    Trainable parameters per site: 1. Use it to find which layers matter, or to leave some out (`g` = 0).

    Args:
        start: g of a fresh adapter; 1 is the identity.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        net = pf.adapt(model, {"1": pf.LayerGate()})
        skipped = {"1": {"g": torch.zeros(1)}}
        x = torch.ones(3, 8)
        assert torch.equal(net.apply(skipped, x), model[0](x))
    """

    cases: ClassVar[Cases] = ({}, {"start": 0.5})

    start: float = 1.0

    @property
    def identity(self) -> bool:
        return self.start == 1

    def init(self, rng: Rng, m: Place) -> Leaf:
        before, after = m.sizes
        if before != after:
            raise ValueError(
                f"a LayerGate mixes what goes into a module with what comes out, and here {before or 'no'} features "
                f"go in and {after} come out: name a module of one width, such as a whole layer"
            )
        return {"g": rng.full(1, value=self.start)}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return x + p["g"] * (y - x)
