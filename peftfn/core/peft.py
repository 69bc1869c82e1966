"""How Hugging Face PEFT writes a method: `Peft`, one record for each method that PEFT has too."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Leaf = dict[str, Tensor]
"""The trainable tensors of one method at one site."""
Config = Mapping[str, Any]
"""A configuration of PEFT's."""


@dataclass(frozen=True)
class Peft:
    """How Hugging Face PEFT writes a method: what `formats/peft.py` needs for it.

    Args:
        type: `peft_type`.
        keys: our tensor's name → the key behind `base_model.model.<module path>.` in the file.
        fields: our field → PEFT's configuration key; "outer.inner" is a key of the object under `outer`.
        values: our field → pairs (our value, PEFT's), for fields whose values differ; the first pair that fits counts.
        fixed: configuration that distinguishes this class from others of its type; `...` is anything that is set.
        shared: our tensor's name → the key behind `base_model.`, for tensors that the sites share.
        group: a module's name → what stands for "{}" in those keys, where only the sites of one group share.
        per_target: the sites that one name in `target_modules` matches share the bank, if of one shape; each has
            a copy of it in the file.
        rows: a tensor of the bank → the constant that says which of its rows a site has in the file.
        reads: (our fields by `fields`, PEFT's configuration) ↦ our fields, where reading is more than renaming.
        writes: method ↦ what else its configuration has. It raises ValueError for what PEFT cannot express.
        leaf_to: (method, leaf and constants) ↦ {PEFT's key: tensor in PEFT's shape}, where the shapes differ. (Reading
            needs no such rule: a tensor from a file is reshaped to the shape our leaf has.)
        leaf_from: (method, {PEFT's key: tensor}, w [out, in], bias [out] or None) ↦ leaf and constants, for methods
            whose tensors follow from values of the file or the base. Shared tensors stand under the keys of `shared`.
            It may raise KeyError for a missing key, and raises ValueError for what does not fit.
    """

    type: str
    keys: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Sequence[tuple[Any, Any]]] = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    group: Callable[[str], str] = str
    per_target: bool = False
    rows: Mapping[str, str] = field(default_factory=dict)
    reads: Callable[[dict[str, Any], Config], dict[str, Any]] | None = None
    writes: Callable[[Any], Config] | None = None
    leaf_to: Callable[[Any, Leaf], Leaf] | None = None
    leaf_from: Callable[[Any, Leaf, Tensor, Tensor | None], Leaf] | None = None

    def read(self, config: Config) -> dict[str, Any]:
        """Return our fields from a configuration: `cls(**cls.peft.read(config))` is the method."""

        def ours(name: str, value: Any) -> Any:
            pairs = self.values.get(name, ())
            return next((ours for ours, theirs in pairs if theirs == value and type(theirs) is type(value)), value)

        found = {}
        for name, key in self.fields.items():
            head, _, tail = key.partition(".")
            inside = config.get(head, {}) if tail else config
            if (tail or head) in inside:
                found[name] = ours(name, inside[tail or head])
        return found if self.reads is None else self.reads(found, config)

    def written(self, method: Any) -> dict[str, Any]:
        """Return PEFT's configuration of a method. ValueError if PEFT cannot express it."""
        more = {} if self.writes is None else self.writes(method)
        out: dict[str, Any] = dict(self.fixed)
        for name, key in self.fields.items():
            value, (head, _, tail) = getattr(method, name), key.partition(".")
            if name in self.values:
                value = self._translated(method, name, value)
            out[head] = {**(out[head] if isinstance(out.get(head), dict) else {}), tail: value} if tail else value
        return out | dict(more)

    def tensors(self, method: Any, p: Leaf) -> Leaf:
        """Return {PEFT's key: tensor in PEFT's shape} of a leaf and its constants."""
        return self.named(p) if self.leaf_to is None else self.leaf_to(method, p)

    def named(self, p: Leaf) -> Leaf:
        """Return {PEFT's key: tensor}, with unchanged tensors."""
        return {key: p[k] for k, key in self.keys.items() if k in p}

    def _translated(self, method: Any, name: str, value: Any) -> Any:
        for ours, theirs in self.values[name]:
            if ours == value:
                return theirs
        raise ValueError(
            f"{type(method).__name__}.{name} is {value!r}, which PEFT does not have: PEFT has "
            f"{list(dict.fromkeys(ours for ours, _ in self.values[name]))}"
        )


_CHOICE = "peftfn.targets(model, peftfn.%s(), {}) makes the rules of peftfn.adapt"
_STARTS = ("eva", "corda", "lora_ga", "loftq")
ELSEWHERE = {
    "target_modules": "the pattern of a rule says which layers: peftfn.adapt(model, {'q_proj|v_proj': peftfn.%s()}), "
    "or peftfn.targets",
    "modules_to_save": "a separate rule trains a layer whole: peftfn.adapt(model, {…, 'lm_head': peftfn.Full()})",
    "bias": "a separate rule trains biases: peftfn.adapt(model, {…, 'bias': peftfn.Full()})",
    "trainable_token_indices": "a separate rule trains rows of an embedding: peftfn.adapt(model, {…, 'embed_tokens': "
    "peftfn.TrainableTokens((…))})",
    "exclude_modules": _CHOICE.format("…, exclude=[…]"),
    "layers_to_transform": _CHOICE.format("…, layers=[…]"),
    "layers_pattern": _CHOICE.format("…, layers=[…], layers_pattern=…"),
    "rank_pattern": _CHOICE.format("…, rank_pattern={…}"),
    "alpha_pattern": _CHOICE.format("…, alpha_pattern={…}"),
    "target_parameters": _CHOICE.format("parameters=[…]"),
    "task_type": _CHOICE.format("…, task='SEQ_CLS'") + ", with one for a fresh head; no other task needs a word",
    "ensure_weight_tying": "tied weights are two sites, which one leaf can train: docs/from_peft.md has it",
    "fan_in_fan_out": "leave it out: the layer's class says how its weight is stored",
    "alora_invocation_tokens": "activated LoRA is a separate method here: give peftfn.ALoRA(invocation=(…))",
    "num_virtual_tokens": "PEFT's num_virtual_tokens is n here: give n=…",
    **{f"{start}_config": f"values to start from are functions: see peftfn.starts.{start}" for start in _STARTS},
    "inference_mode": "leave it out: an adapter trains where you differentiate in it",
}
"""PEFT's words that are not hyper-parameters here → what to write instead."""


def refuse_words(cls: Any, given: Config, registry: Iterable[Any]) -> None:
    """Raise TypeError, with our name, if a keyword argument of `cls` is a name of PEFT's."""
    own = inspect.signature(cls.__init__).parameters
    others = [c for c in registry if c.peft]
    for word, value in given.items():
        if word in own:
            continue
        for c in (cls, *others):
            ours = next((f for f, key in c.peft.fields.items() if key == word), None) if c.peft else None
            if ours in own:
                raise TypeError(f"{cls.__name__} has no argument {word!r}; PEFT's {word} is {ours} here: give {ours}=…")
        fits = [c for c in others if cls.peft and c.peft.type == cls.peft.type and word in c.peft.fixed]
        fits = [c for c in fits if is_(value, c.peft.fixed[word])]
        if fits:
            raise TypeError(
                f"{cls.__name__} has no argument {word!r}; {word}={value!r} is a separate method here: give "
                f"peftfn.{fits[0].__name__}(…)"
            )
        if word in ELSEWHERE:
            cure = ELSEWHERE[word].replace("%s", cls.__name__)
            raise TypeError(f"{cls.__name__} has no argument {word!r}: {cure}")


def is_(have: Any, want: Any) -> bool:
    """Whether a configuration has a value of `Peft.fixed`: `...` stands for anything that is set."""
    return have not in (None, False) if want is ... else bool(have == want)
