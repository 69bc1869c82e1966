"""Several methods at one module, one around the other."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclasses.dataclass(frozen=True)
class ModuleChain(ModuleMethod):
    """Methods one around the other at the same module: the first is the innermost. `chain` makes it.

    What comes out of the module goes through `after` of the first method, then of the second, …; what goes in went
    through `before` of the last method first. All of them see the same x in `after`.

    Args:
        methods: at least one method at modules; none of them has `leave`, or shares tensors among sites.

    Raises:
        TypeError: an argument is no method at modules.
        ValueError: a method has `leave`, or shares tensors among its sites.

    Example:
        method = pf.ModuleChain((pf.Bottleneck(2), pf.Bottleneck(4, activation="relu")))
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0": method})
    """

    cases: ClassVar[Cases] = ()
    methods: tuple[ModuleMethod, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for m in self.methods:
            if not isinstance(m, ModuleMethod):
                raise TypeError(
                    f"chain: {m!r} does not act on a module's forward, and another of the chain does: give methods of "
                    "one family, and the others a rule of their own"
                )
            if m.overrides("shared") or m.overrides("bank") or m.overrides("leave"):
                what = "sees the whole output" if m.overrides("leave") else "shares tensors among its sites"
                raise ValueError(f"chain: {m} {what}, which a chain cannot; give it a separate rule")

    def __str__(self) -> str:
        return f"chain({', '.join(map(str, self.methods))})"

    @property
    def identity(self) -> bool:
        return all(m.identity for m in self.methods)

    @property
    def exact_gradient(self) -> bool:
        return all(m.exact_gradient for m in self.methods)

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return all(m.per_row for m in self.methods)

    @property
    def sees_mask(self) -> bool:  # type: ignore[override]
        return any(m.sees_mask for m in self.methods)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return all(m.causal for m in self.methods)

    @property
    def features_last(self) -> bool:  # type: ignore[override]
        return all(m.features_last for m in self.methods)

    @property
    def watched(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for m in self.methods for name in m.watched))

    @property
    def entered(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for m in self.methods for name in m.entered))

    def _part(self, p: Mapping[str, Tensor], i: int) -> Leaf:
        return {k.partition(".")[2]: v for k, v in p.items() if k.startswith(f"{i}.")}

    def init(self, rng: Rng, m: Place) -> Leaf:
        return {f"{i}.{k}": t for i, f in enumerate(self.methods) for k, t in f.init(rng, m).items()}

    def frozen(self, rng: Rng, m: Place) -> Leaf:
        return {f"{i}.{k}": t for i, f in enumerate(self.methods) for k, t in f.frozen(rng, m).items()}

    def prepare(self, p: Leaf, m: Place) -> Leaf:
        made = [f.prepare(self._part(p, i), m) for i, f in enumerate(self.methods)]
        return {f"{i}.{k}": t for i, q in enumerate(made) for k, t in q.items()}

    def _seen(self, f: ModuleMethod, seen: tuple[Tensor, ...]) -> list[Tensor]:
        """What of `seen` one of the methods asked for."""
        start = int(self.sees_mask)
        stop = start + len(self.watched)
        outputs = dict(zip(self.watched, seen[start:stop], strict=True))
        inputs = dict(zip(self.entered, seen[stop:], strict=True))
        masks = seen[:start] if f.sees_mask else ()
        return [*masks, *(outputs[name] for name in f.watched), *(inputs[name] for name in f.entered)]

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        for i, f in reversed([*enumerate(self.methods)]):
            x = f.before(self._part(p, i), m, x, *self._seen(f, seen))
        return x

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        for i, f in enumerate(self.methods):
            y = f.after(self._part(p, i), m, x, y, *self._seen(f, seen))
        return y

    def eval(self) -> "ModuleChain":
        return ModuleChain(tuple(m.eval() for m in self.methods))

    @property
    def hooks(self) -> frozenset[str]:
        return frozenset(hook for m in self.methods for hook in m.hooks)
