"""What a method is: a frozen dataclass of hyper-parameters with pure functions on one weight, and the registry."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.nn import functional as F

from peftfn.rng import Rng

Leaf = dict[str, Tensor]
"""The trainable tensors of one method at one site."""
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
class Peft:
    """How Hugging Face PEFT writes a method: what `formats/peft.py` needs to know of it.

    type: `peft_type`. keys: our tensor's name → the key behind `base_model.model.<module path>.` in the file.
    fields: our field → PEFT's configuration key. fixed: configuration that tells this class from others of its type.
    shared: our tensor's name → the key behind `base_model.`, for tensors that the sites share.
    """

    type: str
    keys: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)


registry: dict[str, type["Method"]] = {}
"""Every method by its class name: what a checkpoint names and the laws run over."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of every weight method. A method sees one canonical weight w [out, in] and never the layer it came from.

    Convolutions come flattened to [out, in·k…], embeddings as [dim, vocab], transformers' `Conv1D` transposed;
    a stack of experts [e, out, in] comes one expert at a time. p is everything the method has at the site, by name:
    its trainable leaf, its frozen tensors and what its rule shares.

    A method must define `init` and `delta`. The rest is optional: constants (`frozen`, `shared`), a trainable `bank`,
    less work (`prepare`), more speed (`product`, `linear`), the layer's `bias`, and what scale and add mean in closed
    form (`scaled`, `summed`).
    """

    kinds: ClassVar[frozenset[str]] = MATRIX
    per_row: ClassVar[bool] = True
    """Whether a mixed batch may run `linear` and `product` once a row; False where they make a dense weight."""
    peft: ClassVar[Peft | None] = None
    """How PEFT writes it, if PEFT has it."""
    mergeable: ClassVar[bool] = True
    """Whether there is a `delta`. Without one (a router that looks at x) there is only `linear`, and no merge."""
    cases: ClassVar[Cases] = ({},)
    """Hyper-parameters the laws run this method with, as keyword arguments. For weights as small as [6, 8]."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):
            return
        old = registry.get(cls.__name__)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a method named {cls.__name__} exists already, in {old.__module__}; checkpoints name methods by their "
                "class, so give this one another name"
            )
        registry[cls.__name__] = cls

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        """The fresh trainable tensors for w [out, in]. Raise ValueError where a size does not fit.

        w may be on the meta device (then so is `rng`, and only shapes count).
        """
        raise NotImplementedError(f"{type(self).__name__} must define init(rng, w)")

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        """The change of the weight, [out, in]: what the method means. p is prepared; both are at least fp32."""
        why = "must define delta(p, w)" if self.mergeable else "depends on the input: it is no change of the weight"
        raise ValueError(f"{type(self).__name__} {why}")

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        """Constants of this site: made once by `adapt`, never trained. Any dtype."""
        return {}

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        """Constants that belong to no single site: {site: {name: tensor}} for all canonical weights of the rule.

        One tensor given to several sites is stored once.
        """
        return {}

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        """Trainable tensors that belong to no single site: one entry of the adapter, under the method's name; every
        site of the rule has them in its p."""
        return {}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        """What `delta`, `product` and `linear` get in place of p: anything that depends on parameters alone.

        Runs in fp32 or better, once a call, or once for many calls through `net.prepare`. If it changes a value it
        also changes its name, so that a prepared adapter can be told from a raw one.
        """
        return p

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        """The adapted bias [out] of the layer, for methods that change it. b is None where the layer has none."""
        return b

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        """`dot(x, w + delta)`, [..., out], for any layer whose input meets the weight in `dot` alone."""
        return dot(x, w + self.delta(p, w).to(w.dtype))

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        """`F.linear(x, w + delta)`, for methods that work on the features x [..., in] themselves."""
        return self.product(p, w, x, F.linear)

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        """p whose delta is s times that of p (both prepared), or None where there is no such thing."""
        return None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        """p whose delta is the sum of those of ps (all prepared), or None where there is no such thing."""
        return None

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter leaves the model unchanged."""
        return True

    @property
    def exact_gradient(self) -> bool:
        """Whether gradients are those of the output, with nothing in it held constant (as DoRA holds its norm)."""
        return True

    def eval(self) -> Self:
        """The method as it is when the model is in eval mode."""
        return dataclasses.replace(self, dropout=0.0) if getattr(self, "dropout", 0.0) else self  # type: ignore[call-arg]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method that a PEFT configuration describes; override where it is more than a renaming of fields."""
        assert cls.peft is not None
        return cls(**{f: config[key] for f, key in cls.peft.fields.items() if key in config})

    def to_peft(self) -> dict[str, Any]:
        """PEFT's configuration of this method. Raise ValueError for what PEFT cannot express."""
        assert self.peft is not None
        return {key: getattr(self, f) for f, key in self.peft.fields.items()} | dict(self.peft.fixed)

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        """{PEFT's key: tensor in PEFT's shape} of a leaf and its constants; override where shapes differ.

        (Reading needs no such rule: a tensor from a file is reshaped to the shape our leaf has.)
        """
        assert self.peft is not None
        return {key: p[k] for k, key in self.peft.keys.items() if k in p}

    @classmethod
    def fast_linear(cls) -> bool:
        """Whether `linear` is more than the dense weight."""
        return cls.overrides("linear") or cls.overrides("product")

    @classmethod
    def overrides(cls, name: str) -> bool:
        return getattr(cls, name) is not getattr(Method, name)


def positive(method: Method, **values: float) -> None:
    """Raise ValueError unless every value is a finite number > 0, and a whole one where the field says int."""
    types = {f.name: f.type for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    for name, value in values.items():
        whole = types.get(name) in (int, "int")
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            kind = "a positive integer" if whole else "a finite number above 0"
            raise ValueError(f"{type(method).__name__}.{name} is {value!r}; it must be {kind}: give {name} >= 1")


def divides(method: Method, name: str, block: int, **sizes: int) -> None:
    """Raise ValueError unless `block` (the field `name`) divides every size."""
    for size_name, size in sizes.items():
        if size % block:
            near = [d for d in range(1, size + 1) if size % d == 0]
            raise ValueError(
                f"{type(method).__name__}.{name} is {block}, which does not divide {size_name}={size}: "
                f"choose one of {sorted(near, key=lambda d: abs(d - block))[:5]}"
            )


def probability(method: Method, **values: float) -> None:
    """Raise ValueError unless every value is in [0, 1)."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{type(method).__name__}.{name} is {value!r}; it is a probability: 0 <= {name} < 1")


def choice(method: Method, name: str, options: tuple[Any, ...]) -> None:
    """Raise ValueError unless the field `name` is one of the options."""
    value = getattr(method, name)
    if value not in options:
        raise ValueError(f"{type(method).__name__}.{name} is {value!r}; choose one of {list(options)}")
