"""What a method is: a frozen dataclass of hyper-parameters with pure functions on one weight, and the registry."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.fields import checks_of
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


def names(text: str) -> dict[str, str]:
    """ "ours=theirs ours=theirs …" as a mapping; one name alone stands for both."""
    pairs = (pair.partition("=") for pair in text.split())
    return {ours: theirs or ours for ours, _, theirs in pairs}


@dataclasses.dataclass(frozen=True)
class Peft:
    """How Hugging Face PEFT writes a method: what `formats/peft.py` needs to know of it.

    Args:
        type: `peft_type`.
        keys: our tensor's name → the key behind `base_model.model.<module path>.` in the file.
        fields: our field → PEFT's configuration key; "outer.inner" is a key of the object under `outer`.
        values: our field → pairs (our value, PEFT's), for fields whose values differ; the first pair that fits counts.
        fixed: configuration that tells this class from others of its type; `...` is anything that is set.
        shared: our tensor's name → the key behind `base_model.`, for tensors that the sites share.
        group: a module's name → what stands for "{}" in those keys, where only the sites of one group share.
        per_target: the sites that one name in `target_modules` finds share the bank, if they are of one shape; each has
            a copy of it in the file.
        rows: a tensor of the bank → the constant that says which of its rows a site has in the file.
    """

    type: str
    keys: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Sequence[tuple[Any, Any]]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    group: Callable[[str], str] = str
    per_target: bool = False
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields from a configuration."""

        def ours(field: str, value: Any) -> Any:
            pairs = self.values.get(field, ())
            return next((ours for ours, theirs in pairs if theirs == value and type(theirs) is type(value)), value)

        found = {}
        for field, key in self.fields.items():
            head, _, tail = key.partition(".")
            inside = config.get(head, {}) if tail else config
            if (tail or head) in inside:
                found[field] = ours(field, inside[tail or head])
        return found

    def written(self, method: "Method") -> dict[str, Any]:
        """PEFT's configuration from our fields."""
        out: dict[str, Any] = dict(self.fixed)
        for field, key in self.fields.items():
            value, (head, _, tail) = getattr(method, field), key.partition(".")
            if field in self.values:
                value = self._translated(method, field, value)
            out[head] = {**(out[head] if isinstance(out.get(head), dict) else {}), tail: value} if tail else value
        return out

    def _translated(self, method: "Method", field: str, value: Any) -> Any:
        for ours, theirs in self.values[field]:
            if ours == value:
                return theirs
        raise ValueError(
            f"{type(method).__name__}.{field} is {value!r}, which PEFT does not have: it has "
            f"{list(dict.fromkeys(ours for ours, _ in self.values[field]))}"
        )


@dataclasses.dataclass(frozen=True)
class Padding:
    """A leaf of one rank, with zeros appended to its tensors, is a leaf of a larger rank with the same change.

    gain: the tensors that the method's `scale` multiplies. fields: the fields in which the two methods may differ.
    """

    gain: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset({"rank", "alpha", "rslora", "dropout", "init_weights"})


class LowRank(NamedTuple):
    """diag(rows) (W + scale·up down): up [..., out, r], down [..., r, in], rows [..., out] or None for ones.

    dropout: probability of dropping a feature of x on its way to `down`.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    rows: Tensor | None = None
    dropout: float = 0.0


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
    changes_weight: ClassVar[bool] = True
    """Whether `delta` may be other than zero; else the weight stays in its slot, and `bias` is all there is."""
    absolute: ClassVar[frozenset[str]] = frozenset()
    """Names of trainable matrices that are weights, and no change of them: weight decay must leave these alone."""
    peft: ClassVar[Peft | None] = None
    """How PEFT writes it, if PEFT has it."""
    padding: ClassVar[Padding | None] = None
    """How `conform` fits a leaf to a larger rank or another scale; None: not at all."""
    linear_in: ClassVar[tuple[str, ...]] = ()
    """Prepared tensors in which `delta` is linear, the others being constants: then `scaled` and `summed` follow."""
    scales_with: ClassVar[tuple[str, ...]] = ()
    """Prepared tensors that multiply `delta` by s when they are multiplied by s: then `scaled` follows."""
    in_eval: ClassVar[tuple[tuple[str, Any], ...]] = (("dropout", 0.0),)
    """Fields that have this value when the model is in eval mode."""
    mergeable: ClassVar[bool] = True
    """Whether there is a `delta`. Without one (a router that looks at x) there is only `linear`, and no merge."""
    outside: ClassVar[frozenset[str]] = frozenset()
    """Fields that no function here reads, because a schedule or a penalty in the training loop does."""
    cases: ClassVar[Cases] = ({},)
    """Hyper-parameters the laws run this method with, as keyword arguments. For weights as small as [6, 8]."""

    _own: ClassVar[frozenset[str]] = frozenset()
    """What the class and its bases before Method define."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own = frozenset(name for c in cls.__mro__[: cls.__mro__.index(Method)] for name in vars(c))
        if cls.__name__.startswith("_"):
            return
        old = registry.get(cls.__name__)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a method named {cls.__name__} exists already, in {old.__module__}; checkpoints name methods by their "
                "class, so give this one another name"
            )
        registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Check the fields by their types (`Whole`, `Positive`, `Probability`, `Literal`)."""
        for _, check in checks_of(type(self)):  # type: ignore[arg-type]
            check(self)

    def __str__(self) -> str:
        """The first field, and those that do not have their default."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        shown = [f"{f.name}={v!r}" for i, (f, v) in enumerate(values) if i == 0 or v != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

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

    def prepare_all(self, ps: Sequence[Leaf], ws: Sequence[Tensor]) -> list[Leaf]:
        """`prepare` at several sites whose weights have one shape, for methods that do it in fewer steps together."""
        return [self.prepare(p, w) for p, w in zip(ps, ws, strict=True)]

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        """The adapted bias [out] of the layer, for methods that change it. b is None where the layer has none."""
        return b

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        """`dot(x, w + delta)`, [..., out], for any layer whose input meets the weight in `dot` alone."""
        return dot(x, w + self.delta(p, w).to(w.dtype))

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        """`F.linear(x, w + delta)`, for methods that work on the features x [..., in] themselves."""
        return self.product(p, w, x, F.linear)

    def low_rank(self, p: Leaf) -> LowRank | None:
        """What `linear` and `product` compute, where that is a low-rank change: a GPU's kernels then run it, and mixed
        batches run all adapters in two batched products. p may have a leading axis of adapters, or one in some of its
        tensors only."""
        return None

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        """p whose delta is s times that of p (both prepared), or None where there is no such thing."""
        names = self.linear_in or self.scales_with
        return {k: s * t if k in names else t for k, t in p.items()} if names else None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        """p whose delta is the sum of those of ps (all prepared), or None where there is no such thing."""
        names = self.linear_in
        return (
            {k: torch.stack([p[k] for p in ps]).sum(0) if k in names else t for k, t in ps[0].items()}
            if names
            else None
        )

    def dropped(self, x: Tensor) -> Tensor:
        """x with features dropped at the rate of the field `dropout`; ids of an embedding have none to drop."""
        rate = getattr(self, "dropout", 0.0)
        return F.dropout(x, rate) if rate and x.is_floating_point() else x

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter leaves the model unchanged; by default, unless `init_weights` is "random"."""
        return getattr(self, "init_weights", "default") != "random"

    @property
    def exact_gradient(self) -> bool:
        """Whether gradients are those of the output, with nothing in it held constant (as DoRA holds its norm)."""
        return True

    def eval(self) -> Self:
        """The method as it is when the model is in eval mode."""
        changed = {f: v for f, v in self.in_eval if getattr(self, f, v) != v}
        return dataclasses.replace(self, **changed) if changed else self

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method that a PEFT configuration describes; override where it is more than a renaming of fields."""
        assert cls.peft is not None
        return cls(**cls.peft.read(config))

    def to_peft(self) -> dict[str, Any]:
        """PEFT's configuration of this method. Raise ValueError for what PEFT cannot express."""
        assert self.peft is not None
        return self.peft.written(self)

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        """{PEFT's key: tensor in PEFT's shape} of a leaf and its constants; override where shapes differ.

        (Reading needs no such rule: a tensor from a file is reshaped to the shape our leaf has. Where that is not all,
        define `from_peft_leaf`.)
        """
        assert self.peft is not None
        return {key: p[k] for k, key in self.peft.keys.items() if k in p}

    def from_peft_leaf(self, t: Leaf, w: Tensor, bias: Tensor | None) -> Leaf:
        """The leaf and constants of a site from {PEFT's key: tensor}, for methods whose tensors follow from values: of
        the file's tensors, of the base's weight w [out, in], of its bias [out]. Shared tensors stand under the keys
        that `Peft.shared` gives. A key that is not there may end in a KeyError. Raise ValueError for what does not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} reads PEFT's tensors by name and shape")

    @classmethod
    def fast_linear(cls) -> bool:
        """Whether `linear` is more than the dense weight."""
        return "linear" in cls._own or "product" in cls._own

    @classmethod
    def overrides(cls, name: str) -> bool:
        return name in cls._own
