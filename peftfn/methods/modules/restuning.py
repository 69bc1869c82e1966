"""Res-tuning: a side path of small networks that reads the backbone's hidden states, and sends no gradient into it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class ResTuning(ModuleMethod):
    """b in place of what goes into a module, or comes out: b ← lateral_i(s_i) + vertical_i(b), i = 0, 1, …, from b = r.

    s_i [..., d] are what the modules `stems` return and r what `root` returns, all detached: no gradient goes into the
    model before this module, so that training needs no activations of it. lateral_i and vertical_i are each
    h + U gelu(D h + c) + e, with tensors of their own.

    Jiang et al., "Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from Backbone", 2023,
    arXiv:2310.19859; as ms-swift has it with its `res_adapter` and stems of one width.

    Trainable parameters per site: 2·stems·(2·rank·d + rank + d). Use it at the last norm or the head, with the layers
    as stems, where memory is short.

    Args:
        stems: names of modules, or unique ends of names, that run before this one, in order.
        rank: features between D and U.
        root: name of the module that returns r; "": the first stem.
        root_of: what r is of the root: its "output" or its "input".
        of: what b takes the place of: "input" or "output".
        dim: features of the stems, where the module's weights do not tell; 0: those that go in or come out.

    Example:
        model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)], torch.nn.Linear(8, 2))
        net = pf.adapt(model, {"3": pf.ResTuning(("0", "1", "2"), rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"stems": ("stem",), "rank": 2, "of": "output", "dim": 6},
        {"stems": ("stem",), "rank": 2, "of": "output", "root": "stem"},
        {"stems": ("embed",), "rank": 2, "root": "stem", "root_of": "input"},
    )

    stems: tuple[str, ...] = ()
    rank: PositiveInt = 32
    root: str = ""
    of: Literal["input", "output"] = "input"
    dim: int = 0
    root_of: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stems", tuple(self.stems))  # a list, as files have it
        if not self.stems:
            raise ValueError('ResTuning.stems is empty; name modules that it reads: stems=("layers.0", "layers.1")')

    @property
    def watched(self) -> tuple[str, ...]:
        first = (self.root or self.stems[0],) if self.root_of == "output" else ()
        return tuple(dict.fromkeys((*first, *self.stems)))

    @property
    def entered(self) -> tuple[str, ...]:
        return (self.root or self.stems[0],) if self.root_of == "input" else ()

    @property
    def hooks(self) -> frozenset[str]:
        return frozenset({"before" if self.of == "input" else "after"})

    @property
    def identity(self) -> bool:
        return False

    @property
    def exact_gradient(self) -> bool:
        return False

    def init(self, rng: Rng, m: Place) -> Leaf:
        d, r = self.dim or (m.width_in if self.of == "input" else m.width), self.rank
        leaf: Leaf = {}
        for i in range(len(self.stems)):
            for side in ("lateral", "vertical"):
                leaf |= {f"{side}{i}_down": rng.kaiming(r, d), f"{side}{i}_c": rng.zeros(r)}
                leaf |= {f"{side}{i}_up": rng.kaiming(d, r), f"{side}{i}_b": rng.zeros(d)}
        return leaf

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        return x if self.of == "output" else self.path(p, x, seen)

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y if self.of == "input" else self.path(p, y, seen)

    def path(self, p: Leaf, h: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        """b, in place of h."""
        b = seen[-1 if self.root_of == "input" else 0].detach()
        outputs = seen[: len(self.watched)]
        for i, s in enumerate(outputs[-len(self.stems) :]):
            if s.shape != h.shape:
                raise ValueError(
                    f"what the stem {self.stems[i]} returns is {list(s.shape)}, and takes the place of "
                    f"{list(h.shape)}: name stems with the hidden states of all tokens, and a place that sees them (a "
                    "head may see the last token alone: name the norm before it)"
                )
            b = _tuned(p, f"lateral{i}", s.detach()) + _tuned(p, f"vertical{i}", b)
        return b


def _tuned(p: Leaf, name: str, h: Tensor) -> Tensor:
    inner = F.gelu(F.linear(h, p[f"{name}_down"], p[f"{name}_c"]))
    return h + F.linear(inner, p[f"{name}_up"], p[f"{name}_b"])
