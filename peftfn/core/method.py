"""What a method is: a frozen dataclass of hyper-parameters with pure functions, and the registry of all methods.

It is one long file because authors read it whole: half of it is what each member means.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import checks_of
from peftfn.core.indices import Index as Index
from peftfn.core.peft import Leaf as Leaf
from peftfn.core.peft import Peft, refuse_words
from peftfn.core.rng import Rng

Cases = Sequence[dict[str, Any]]
"""Hyper-parameters to test a method with, as keyword arguments."""
Product = Callable[[Tensor, Tensor], Tensor]
"""x, m [rows, in] ↦ [..., rows]: the layer's own product (linear, embedding lookup, convolution), channels last."""

MATRIX = frozenset({"linear", "linear_t", "embedding", "conv", "conv_t", "stack", "stack_t"})
"""Kinds of site that are a matrix [out, in], or a stack of them."""
LINEAR = frozenset({"linear", "linear_t", "stack", "stack_t"})
"""Kinds of site whose input is a feature vector [..., in]."""
ALL = MATRIX | {"other"}
"""Every kind: "other" are norms, biases, and any other tensor."""


@dataclasses.dataclass(frozen=True)
class Padding:
    """A leaf of one rank, with zeros appended to its tensors, is a leaf of a larger rank with the same change.

    Args:
        scaled: the tensors that the method's `scale` multiplies.
        fields: the fields in which the two methods may differ.
    """

    scaled: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset({"rank", "alpha", "rslora", "dropout", "init_weights"})


class LowRank(NamedTuple):
    """diag(gain) (W + scale·up down): up [..., out, r], down [..., r, in], gain [..., out] or None for ones.

    dropout: probability of dropping a feature of x on its way to `down`.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    gain: Tensor | None = None
    dropout: float = 0.0


registry: dict[str, type["Method"]] = {}
"""Every method by its class name: what a checkpoint names and the laws run over."""


def named(word: str) -> str | None:
    """The method of that name but for its case, or that PEFT has a configuration of that name for ("LoraConfig")."""
    return {c.casefold(): c for c in registry}.get(word.removesuffix("Config").casefold())


@dataclasses.dataclass(frozen=True)
class Method:
    """What every method has, whatever it adapts. Derive from a family: `Weight` for methods that change a weight,
    `ModuleMethod` for those around a module's forward, `Tokens` or `Prefix` for those on a backbone's inputs,
    `Along` for a state that goes along its blocks.

    A family (`class Weight(Method, family=True)`) says what its methods define; a method is a frozen dataclass whose
    fields are its hyper-parameters and whose functions are pure. w stands for what the method sees at a site: for
    `Weight`, one canonical weight [out, in]; for the other families, a `Place`. p is everything the method has at the
    site, by name: its trainable leaf, its frozen tensors and what its rule shares.

    Example:
        assert isinstance(pf.LoRA(rank=2), pf.Method)
        assert pf.LoRA(rank=2) == pf.LoRA(2)  # a value: it compares, hashes and prints
    """

    # Required.

    kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of site that the method has a meaning for."""
    adapts: ClassVar[str] = "parameter"
    """What the pattern of a rule is matched against, for all methods of a family: the names of the model's parameters
    ("parameter"), of its modules ("module"), or of its backbones ("backbone")."""
    outside: ClassVar[frozenset[str]] = frozenset()
    """Fields that no function here reads, because a schedule or a penalty in the training loop does."""
    cases: ClassVar[Cases] = ({},)
    """Hyper-parameters the laws run this method with, as keyword arguments. For weights as small as [6, 8]."""

    def init(self, rng: Rng, w: Any) -> Leaf:
        """Return the fresh trainable tensors for w [out, in]. Raise ValueError if a size does not fit.

        w may be on the meta device (then so is `rng`, and only shapes count).
        """
        raise NotImplementedError(f"{type(self).__name__} must define init(rng, w)")

    # Sharing: constants, and tensors of several sites.

    def frozen(self, rng: Rng, w: Any) -> Leaf:
        """Return constants of this site, of any dtype: made once by `adapt`, never trained."""
        return {}

    def shared(self, rng: Rng, weights: Mapping[str, Any]) -> Mapping[str, Leaf]:
        """Return constants that several sites share: {site: {name: tensor}} for all canonical weights of the rule.

        One tensor given to several sites is stored once.
        """
        return {}

    def bank(self, rng: Rng, weights: Mapping[str, Any]) -> Leaf:
        """Return trainable tensors that the sites of the rule share. They are one entry of the adapter, under the
        method's name, and every site of the rule has them in its p."""
        return {}

    def indices(self, p: Leaf, w: Any) -> Mapping[str, Index | Tensor]:
        """Return what its integer constants may have, by name: an `Index`, or the very tensor where the method and the
        shapes determine it. Files are checked against it. p and w have shapes, and p's constants values too."""
        return {}

    # Speed.

    def prepare(self, p: Leaf, w: Any) -> Leaf:
        """Return what the other functions receive in place of p: compute here what depends on parameters alone.

        Runs in fp32 or better, once a call, or once for many calls through `net.prepare`. If it changes a value it
        also changes its name, so that a prepared adapter can be distinguished from a raw one.
        """
        return p

    def prepare_all(self, ps: Sequence[Leaf], ws: Sequence[Any]) -> list[Leaf]:
        """`prepare` at several sites whose weights have one shape. Override it where one step for all is faster:
        DoRA's norms of all layers of a shape are one launch on a GPU."""
        return [self.prepare(p, w) for p, w in zip(ps, ws, strict=True)]

    # What a fresh adapter and a gradient are, and what changes in eval mode.

    in_eval: ClassVar[tuple[tuple[str, Any], ...]] = (("dropout", 0.0),)
    """Fields that have this value when the model is in eval mode."""

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter leaves the model unchanged; by default, unless `init_weights` is "random"."""
        return getattr(self, "init_weights", "default") != "random"

    @property
    def exact_gradient(self) -> bool:
        """Whether gradients are those of the output, with nothing in it held constant (as DoRA holds its norm)."""
        return True

    def dropped(self, x: Tensor) -> Tensor:
        """Return x with features dropped at the rate of the field `dropout`; ids of an embedding are unchanged."""
        rate = getattr(self, "dropout", 0.0)
        return F.dropout(x, rate) if rate and x.is_floating_point() else x

    # Algebra.

    mergeable: ClassVar[bool] = False
    """Whether an adapter of the method can be folded into the model's weights."""

    @property
    def combines(self) -> bool:
        """Whether adapters of the method can be scaled and added."""
        return True

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        """Return tensors whose change is s times that of p (both prepared), or None if there is no closed form."""
        return None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        """Return tensors whose change is the sum of those of ps (all prepared), or None if there is no closed form."""
        return None

    def eval(self) -> Self:
        """Return the method with the values that its fields have in eval mode."""
        changed = {f: v for f, v in self.in_eval if getattr(self, f, v) != v}
        return dataclasses.replace(self, **changed) if changed else self

    # Other descriptions of the method, and its name.

    peft: ClassVar[Peft | None] = None
    """How PEFT writes it, if PEFT has it."""
    padding: ClassVar[Padding | None] = None
    """How `conform` fits a leaf to a larger rank or another scale; None: not at all."""

    def __str__(self) -> str:
        """The first field, and those that do not have their default."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        shown = [f"{f.name}={v!r}" for i, (f, v) in enumerate(values) if i == 0 or v != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    # The machinery of a class.

    _family: ClassVar[bool] = True
    """Whether the class is a family of methods: what it defines is what its methods may override."""
    family: ClassVar[type["Method"]]
    """The family that the class belongs to: `Weight`, `ModuleMethod`, …"""
    _own: ClassVar[frozenset[str]] = frozenset()
    """What the class and its bases define beyond their family."""

    def __init_subclass__(cls, family: bool = False, abstract: bool = False, **kwargs: Any) -> None:
        """family: a base of methods, whose functions its methods override. abstract: a part of some methods; none."""
        super().__init_subclass__(**kwargs)
        cls._family = family
        families = [c for c in cls.__mro__ if vars(c).get("_family")]
        cls.family = families[0]
        cls._own = frozenset(name for c in cls.__mro__ if c is not object and c not in families for name in vars(c))
        if family or abstract or cls.__name__.startswith("_"):
            return
        if families == [Method]:
            raise TypeError(
                f"{cls.__name__} derives from Method, which has only what all families of methods share: derive from "
                f"peftfn.Weight, class {cls.__name__}(peftfn.Weight), for a method that changes a weight, or from "
                "peftfn.ModuleMethod for one around a module's forward"
            )
        old = registry.get(cls.__name__)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a method named {cls.__name__} exists already, in {old.__module__}; checkpoints name methods by their "
                "class, so give this one another name"
            )
        registry[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse PEFT's words with ours. (`__init__` is the dataclass's own.)"""
        if not kwargs.keys() <= cls.__dataclass_fields__.keys():
            refuse_words(cls, kwargs, registry.values())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the fields by their types (`PositiveInt`, `Positive`, `Probability`, `Literal`)."""
        for _, check in checks_of(type(self)):  # type: ignore[arg-type]
            check(self)

    @classmethod
    def overrides(cls, name: str) -> bool:
        return name in cls._own


@dataclasses.dataclass(frozen=True)
class Weight(Method, family=True):
    """Base of every method that changes a weight. It sees one canonical weight w [out, in], never the layer it is of.

    Convolutions come flattened to [out, in·k…], embeddings as [dim, vocab], transformers' `Conv1D` transposed;
    a stack of experts [e, out, in] comes one expert at a time.

    A method must define `init` and `delta`. The rest is optional: constants (`frozen`, `shared`), a trainable `bank`,
    less work (`prepare`), more speed (`product`, `linear`, `low_rank`), the layer's `bias`, and what scale and add mean
    in closed form (`linear_in`, `scales_with`, or `scaled` and `summed`).

    Example:
        class Gain(pf.Weight):
            init = lambda self, rng, w: {"g": rng.zeros(w.shape[0], 1)}
            delta = lambda self, p, w: p["g"] * w
        pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": Gain()})
    """

    # Required.

    kinds: ClassVar[frozenset[str]] = MATRIX

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        """Return the change of the weight, [out, in]: the meaning of the method. p is prepared; both are at least fp32.

        For a method that defines only `bias`, the change is zero.
        """
        if self.only_bias():
            return torch.zeros_like(w)
        why = "must define delta(p, w)" if self.mergeable else "depends on the input, so it has no delta"
        raise ValueError(f"{type(self).__name__} {why}")

    mergeable: ClassVar[bool] = True
    """Whether there is a `delta`. Without one (a router that looks at x) there is only `linear`, and no merge."""

    # When it acts.

    def acts_on(self, ids: Tensor) -> Tensor:
        """Return gates [rows, tokens] for the token ids [rows, tokens] of a call: 1 where the method acts, 0 where the
        base does. Define it in a method that acts on some tokens alone: each call then takes its gates from its ids.
        """
        return torch.ones(ids.shape, device=ids.device)

    # Speed.

    per_row: ClassVar[bool] = True
    """Whether a mixed batch may run `linear` and `product` once a row; False where they make a dense weight."""

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        """Return `dot(x, w + delta)`, [..., out], for any layer that uses its input and weight in `dot` alone."""
        return dot(x, w + self.delta(p, w).to(w.dtype))

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        """Return `F.linear(x, w + delta)`, for methods that work on the features x [..., in] themselves."""
        return self.product(p, w, x, F.linear)

    def low_rank(self, p: Leaf) -> LowRank | None:
        """Return the factors if `linear` and `product` compute a low-rank change: kernels run it on a GPU, and mixed
        batches run all adapters in two batched products. p may have a leading axis of adapters, or one in some of its
        tensors only."""
        return None

    @classmethod
    def fast_linear(cls) -> bool:
        """Whether `linear` is more than the dense weight."""
        return "linear" in cls._own or "product" in cls._own

    # The layer's bias.

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        """Return the adapted bias [out] of the layer, for methods that change it. b is None if it has no bias."""
        return b

    @classmethod
    def only_bias(cls) -> bool:
        """Whether the bias is all that the method changes, so that the weight itself stays in its slot."""
        return "bias" in cls._own and "delta" not in cls._own and cls.mergeable

    # Algebra: what scale and add mean in closed form.

    linear_in: ClassVar[tuple[str, ...]] = ()
    """Prepared tensors in which `delta` is linear, the others being constants: then `scaled` and `summed` follow."""
    scales_with: ClassVar[tuple[str, ...]] = ()
    """Prepared tensors that multiply `delta` by s when they are multiplied by s: then `scaled` follows."""

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        """Return tensors whose delta is s times that of p (both prepared), or None if there is no closed form."""
        names = self.linear_in or self.scales_with
        return {k: s * t if k in names else t for k, t in p.items()} if names else None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        """Return tensors whose delta is the sum of those of ps (all prepared), or None if there is no closed form."""
        names = self.linear_in
        return (
            {k: torch.stack([p[k] for p in ps]).sum(0) if k in names else t for k, t in ps[0].items()}
            if names
            else None
        )
