"""The families of methods that act on modules: `ModuleMethod` around a forward, `Tokens` and `Prefix` on a backbone's
inputs, `Along` with a state that goes along its blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from peftfn.core.method import Leaf, Method
from peftfn.core.rng import Rng
from peftfn.model.model import Model
from peftfn.model.names import ends, near
from peftfn.model.place import MODULE, TOKENS, Place, is_causal, is_encoder_of_two

MASK = "mask"
OUTPUT = "output"
INPUT = "input"
CROSSED = "crossed"
ALONG = "along"


class Companion(NamedTuple):
    """What a method puts at another module than its own, for the length of a call.

    kind: a key of the table of `slots/companions.py`: what it does there.
    """

    at: str  # name of that module
    kind: str

    @property
    def key(self) -> str:
        """Under which name a call has what it found there."""
        return MASK if self.kind == MASK else f"into {self.at}" if self.kind == INPUT else self.at


@dataclasses.dataclass(frozen=True)
class OfModule(Method, family=True):
    """What the families at modules share: methods see a `Place` where those for weights see w."""

    per_row: ClassVar[bool] = True
    """Whether a mixed batch may run the method under vmap over rows; False: once for each adapter, on its rows."""

    def init(self, rng: Rng, m: Place) -> Leaf:
        """Return the fresh trainable tensors at the place m. Raise ValueError if a size does not fit.

        rng may be on the meta device; m's module never is there because of it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define init(rng, m)")

    def companions(self, m: Place, model: Model) -> tuple[Companion, ...]:
        """Return what the method needs at other modules. Raise ValueError if the model lacks one."""
        return ()

    def settle(self, m: Place) -> None:
        """Make what is to stand at the place besides tensors (`Place.network`): before the first call of each copy of
        the model, where no transform and no compiler sees it."""


@dataclasses.dataclass(frozen=True)
class ModuleMethod(OfModule, family=True):
    """Base of every method around a module's forward. x and y are the hidden states [..., d] that go in and come out.

    The site is a module, by its dotted name, and the pattern of a rule is matched against the end of it: "mlp" finds
    layers.0.mlp, and not layers.0.mlp.up_proj. A method defines `init`, and `before` or `after`, or both; or `leave`,
    which sees all arguments and the whole output. The hidden states are the first positional argument, or the keyword
    argument hidden_states; and the output, or its first element.

    A mixed batch runs the module's own forward once for all its rows. Gates weigh each function by itself: the module
    sees x + Σ g_k (before_k(x) − x), and y + Σ g_k (after_k(y) − y) comes out.

    Example:
        class Shift(pf.ModuleMethod):
            init = lambda self, rng, m: {"b": rng.zeros(m.width)}
            after = lambda self, p, m, x, y: y + p["b"]
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0": Shift()})
    """

    kinds: ClassVar[frozenset[str]] = frozenset({MODULE})
    adapts: ClassVar[str] = "module"

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        """Return what goes into the module in place of x [..., d]. p is prepared, in the dtype of x."""
        return x

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        """Return what comes out in place of y [..., d]. x is what went in, after `before`."""
        return y

    def leave(self, p: Leaf, m: Place, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Return the output in place of `out`, from all arguments of the module, where `before` and `after` do not do.

        In a mixed batch it runs once for each adapter, on the rows that use it, and the hidden states of what it
        returns are kept. m.module has that adapter's weights while it runs.
        """
        return out

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of modules that run before this one, or unique ends of names: what each returned last in this call
        comes as `seen`, in order."""
        return ()

    @property
    def entered(self) -> tuple[str, ...]:
        """Names of modules, as of `watched`, that began to run before this one returns: the hidden states that went
        into each come as `seen`, after what `watched` names."""
        return ()

    causal: ClassVar[bool] = True
    """Whether what the method makes of a token depends on no later one, as a causal model asks for."""
    features_last: ClassVar[bool] = True
    """Whether hidden states are [..., tokens, d]; where they may be images instead, `adapt` does not try the method."""
    sees_mask: ClassVar[bool] = False
    """Whether `seen` begins with the attention mask of the backbone around the module: bool [rows, past + tokens]. It
    counts virtual tokens, and not the positions of a prefix. Without a mask it is all True."""

    @property
    def hooks(self) -> frozenset[str]:
        """Which of `before`, `after` and `leave` the method has."""
        return frozenset(h for h in ("before", "after", "leave") if self.overrides(h))

    @property
    def combines(self) -> bool:
        """Whether adapters can be scaled and added: `before` and `after` can, x + s (before(x) − x); `leave` cannot."""
        return "leave" not in self.hooks

    def companions(self, m: Place, model: Model) -> tuple[Companion, ...]:
        masks = (Companion(_around(self, m, model), MASK),) if self.sees_mask else ()
        outputs = (Companion(_first(self, name, model), OUTPUT) for name in self.watched)
        return (*masks, *outputs, *(Companion(_first(self, name, model), INPUT) for name in self.entered))


def _around(method: Method, m: Place, model: Model) -> str:
    """The backbone around a module."""
    found = [n for n in model.backbones if not n or n == m.name or m.name.startswith(f"{n}.")]
    if not found:
        raise ValueError(
            f"{method} reads the attention mask, and no backbone is around this module: none whose forward takes "
            "inputs_embeds and attention_mask"
        )
    return max(found, key=len)


def _first(method: Method, name: str, model: Model) -> str:
    """The first name of a watched module."""
    names = {n: s.name for s in model.places.values() for n in (s.name, *s.aliases)}
    found = {names[name]} if name in names else {first for n, first in names.items() if ends(name, n)}
    if len(found) != 1:
        raise ValueError(
            f"{method} reads at {name!r}, and {len(found)} modules of the model that are called have this name, or end "
            f"in it: name one{near(name, list(names))}"
        )
    return found.pop()


@dataclasses.dataclass(frozen=True)
class Tokens(OfModule, family=True):
    """Base of every method with virtual tokens in front of a backbone's own. A method defines `init` and `tokens`.

    The site is a backbone: the innermost module whose forward takes inputs_embeds and attention_mask. The pattern of a
    rule is matched against the end of its name; ".*" finds all backbones. A field `pooled` that is "virtual" puts the
    first virtual token's state at position 0 of the output, in place of the first token's, where attention is not
    causal.

    Example:
        class Prompt(pf.Tokens):
            init = lambda self, rng, m: {"tokens": rng.normal(3, m.width, std=0.02)}
        assert Prompt().adapts == "backbone"
    """

    kinds: ClassVar[frozenset[str]] = frozenset({TOKENS})
    adapts: ClassVar[str] = "backbone"
    combines = False  # type: ignore[assignment]  # a sum of tokens has no meaning

    keep: ClassVar[bool] = False
    """Whether the output has the positions of the virtual tokens too (in `apply`; rows of a mixed batch are cut)."""

    def tokens(self, p: Leaf, m: Place) -> Tensor:
        """Return the virtual tokens [n, d], d being the width of the backbone's embeddings."""
        return p["tokens"]

    def companions(self, m: Place, model: Model) -> tuple[Companion, ...]:
        if not is_encoder_of_two(m.module, m.config):
            return ()
        return tuple(Companion(n, CROSSED) for n in model.backbones if is_causal(model.modules[n]))

    def prepare(self, p: Leaf, m: Place) -> Leaf:
        return {"tokens": self.tokens(p, m)}

    @classmethod
    def overrides(cls, name: str) -> bool:
        return super().overrides(name) or (name == "prepare" and super().overrides("tokens"))


@dataclasses.dataclass(frozen=True)
class Prefix(OfModule, family=True):
    """Base of every method with keys and values in front of those of each layer. A method defines `init` and `prefix`.

    The site is a backbone, as for `Tokens`.

    Example:
        class Cached(pf.Prefix):
            init = lambda self, rng, m: {k: rng.zeros(2, 4, 3, 8) for k in ("keys", "values")}
        assert Cached().adapts == "backbone"
    """

    kinds: ClassVar[frozenset[str]] = frozenset({TOKENS})
    adapts: ClassVar[str] = "backbone"
    combines = False  # type: ignore[assignment]

    def prefix(self, p: Leaf, m: Place) -> tuple[Tensor, Tensor]:
        """Return (keys, values), each [layers, heads of keys, n, size of a head]."""
        return p["keys"], p["values"]

    def prepare(self, p: Leaf, m: Place) -> Leaf:
        return dict(zip(("keys", "values"), self.prefix(p, m), strict=True))

    @classmethod
    def overrides(cls, name: str) -> bool:
        return super().overrides(name) or (name == "prepare" and super().overrides("prefix"))


@dataclasses.dataclass(frozen=True)
class Along(OfModule, family=True):
    """Base of every method with a state of its own that goes along the blocks of a causal backbone, beside the hidden
    states: `start` makes it, and at each block `into` changes what goes in, and `onward` the state after it.

    The site is a backbone, as for `Tokens`. A method defines `init`, `blocks`, `size` and these three functions. The
    state is [rows, tokens, size]; in a mixed batch each row has that of its adapter. `start` is called with a cache of
    its own where the backbone has one, so that a step of `generate` sees new tokens alone.

    Example:
        class Halved(pf.Shadow):
            into = lambda self, p, i, x, state: x + (super().into(p, i, x, state) - x) / 2
        assert Halved().adapts == "backbone"
    """

    kinds: ClassVar[frozenset[str]] = frozenset({TOKENS})
    adapts: ClassVar[str] = "backbone"
    combines = False  # type: ignore[assignment]  # the state is not linear in anything that could be scaled
    per_row = False

    def blocks(self, m: Place) -> tuple[str, ...]:
        """Return the names of the blocks inside of the backbone, in the order of the forward."""
        raise NotImplementedError(f"{type(self).__name__} must define blocks(m)")

    def size(self, m: Place) -> int:
        """Return the features of the state."""
        return m.width

    def start(self, p: Leaf, m: Place, given: dict[str, Tensor], cache: Callable[[Any], Any]) -> Tensor:
        """Return the first state. given: the backbone's inputs_embeds [rows, tokens, d], and those of its input_ids,
        attention_mask and position_ids that the call has. cache(config): what a network of the method with this
        configuration goes on with; None without a cache."""
        raise NotImplementedError(f"{type(self).__name__} must define start(p, m, given, cache)")

    def into(self, p: Leaf, i: int, x: Tensor, state: Tensor) -> Tensor:
        """Return what goes into block i of `blocks` in place of x [rows, tokens, d]."""
        return x

    def onward(self, p: Leaf, i: int, y: Tensor, state: Tensor) -> Tensor:
        """Return the state after block i, which returned y."""
        return state

    def companions(self, m: Place, model: Model) -> tuple[Companion, ...]:
        return tuple(Companion(f"{m.name}.{n}" if m.name else n, ALONG) for n in self.blocks(m))
