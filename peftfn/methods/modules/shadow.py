"""ShadowPEFT: a small model beside a backbone, whose states go along its blocks and correct what goes into them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability, positive_int, rounds
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Along
from peftfn.core.rng import Rng
from peftfn.methods.parts.mirror import SIZES, fresh, of_config, smaller
from peftfn.model.place import Place, is_causal, swapped
from peftfn.tensors.cache import cache_name

DOT, MIRROR, BUFFER = "__", "mirror__", "buffer__"
"""What stands for the dot of a name in a leaf, and in front of the mirror's parameters and of its buffers."""
LISTS = ("layers", "h")
"""What models call their list of blocks; PEFT knows these."""


@dataclass(frozen=True)
class Shadow(Along):
    """x + alpha·U_i D_i (x − s) in place of what goes into block i, and s ← s + σ(G_i y) ⊙ (T_i y − s) after it, y its
    output; at first s = P mirror(embeddings), a model of the backbone's own class with fewer layers, trained in full.

    D_i [rank, d] and U_i [d, rank] are linear, G_i and T_i two layers with a GELU between them, P [d, hidden] where the
    mirror is narrower or wider. The mirror shares the base's embeddings where its width is the base's.

    Lin et al., "ShadowPEFT", 2026, arXiv:2604.19254; equal to PEFT's SHADOW with shadow_model="mirror".

    Trainable parameters per site: a backbone of `depth` layers + blocks·(2·rank·d + 4·update·d + 2·update + 2·d). Use
    it where the small model is wanted by itself too: `shadow_loss` trains it to be one.

    In a call with a cache, the mirror's keys and values are in layers of their own at the end of the cache, which must
    be one that grows (transformers' `DynamicCache`), and empty when the first call gets it.

    Args:
        rank: features between D and U.
        alpha: strength of the correction.
        update: features inside of G and T; None: rank.
        depth: layers of the mirror.
        hidden, intermediate, heads: sizes of the mirror; None: the base's.
        shares: whether the mirror reads the base's embeddings, where its width is the base's; else it has its own.
        blocks_at: numbers of the blocks that s goes along, in order; (): all.
        dropout: probability of dropping a feature of x − s in train mode.
        init_weights: "default" (U zero: a fresh adapter changes nothing), or "random" (U too, for tests).

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {"model": pf.Shadow(rank=4)})
        logits = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = (
        {"rank": 2},
        {"rank": 2, "dropout": 0.5, "hidden": 4, "heads": 1, "intermediate": 6, "update": 3, "init_weights": "random"},
        {"rank": 2, "shares": False, "init_weights": "random"},
    )

    rank: PositiveInt = 8
    alpha: float = 0.1
    update: PositiveInt | None = None
    depth: Annotated[int, positive_int, rounds] = 1
    hidden: PositiveInt | None = None
    intermediate: PositiveInt | None = None
    heads: PositiveInt | None = None
    shares: bool = True
    blocks_at: tuple[int, ...] = ()
    dropout: Probability = 0.0
    init_weights: Literal["default", "random"] = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks_at", tuple(self.blocks_at))  # a list, as files have it

    # The backbone, and the mirror of it.

    def blocks(self, m: Place) -> tuple[str, ...]:
        name = next((n for n in LISTS if isinstance(getattr(m.module, n, None), nn.ModuleList)), None)
        if name is None or not is_causal(m.module) or getattr(m.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self).__name__} goes along the blocks of a causal language model, and a "
                f"{m.made_of.__name__} is none, or has them in no list {' or '.join(LISTS)}"
            )
        count = len(getattr(m.module, name))
        at = self.blocks_at or tuple(range(count))
        if sorted(set(at)) != list(at) or not 0 <= at[0] <= at[-1] < count:
            raise ValueError(f"blocks_at is {at}; give numbers from 0 to {count - 1}, in order, each once")
        return tuple(f"{name}.{i}" for i in at)

    def size(self, m: Place) -> int:
        """The width of the hidden states, which may be wider than the embeddings."""
        return int(of_config(m.module.config, "hidden"))

    def _own_embedding(self, m: Place) -> bool:
        return not self.shares or (self.hidden or self.size(m)) != self.size(m)

    def mirror(self, m: Place) -> nn.Module:
        """The mirror without values."""
        key = self.depth, self.hidden, self.intermediate, self.heads, self.shares
        sizes = {field: value for field in SIZES if (value := getattr(self, field)) is not None}
        return m.network(key, lambda: smaller(m, sizes, embeds=self._own_embedding(m)))

    def settle(self, m: Place) -> None:
        self.mirror(m)

    # What is trained.

    def init(self, rng: Rng, m: Place) -> Leaf:
        d, r, n = self.size(m), self.rank, len(self.blocks(m))
        h, wide = self.update or r, self.hidden or d
        leaf = {"down": _each(n, lambda: rng.kaiming(r, d))}
        leaf["up"] = _each(n, lambda: rng.kaiming(d, r)) if self.init_weights == "random" else rng.zeros(n, d, r)
        for net in ("transform", "gate"):
            leaf |= {f"{net}_0": _each(n, lambda: rng.kaiming(h, d)), f"{net}_b0": rng.uniform(n, h, bound=d**-0.5)}
            leaf |= {f"{net}_1": _each(n, lambda: rng.kaiming(d, h)), f"{net}_b1": rng.uniform(n, d, bound=h**-0.5)}
        if wide != d:
            leaf["projection"] = rng.kaiming(d, wide)
        return leaf | {f"{MIRROR}{k.replace('.', DOT)}": t for k, t in fresh(self.mirror(m), rng).items()}

    def frozen(self, rng: Rng, m: Place) -> Leaf:
        """The mirror's buffers, which are those of the backbone: angles of positions."""
        out: Leaf = {}
        for name, t in self.mirror(m).named_buffers():
            own = dict(m.module.named_buffers()).get(name)
            if own is None or own.shape != t.shape:
                raise ValueError(
                    f"the mirror's {name} {list(t.shape)} is not the backbone's: give heads and hidden sizes that keep "
                    "the size of a head"
                )
            out[f"{BUFFER}{name.replace('.', DOT)}"] = own.detach().to(rng.device, copy=True)
        return out

    # What happens in a call.

    def start(self, p: Leaf, m: Place, given: dict[str, Tensor], cache: Callable[[Any], Any]) -> Tensor:
        net = self.mirror(m)
        own = self._own_embedding(m)
        if own and "input_ids" not in given:
            raise ValueError(
                f"{m.label}: {self} has embeddings of its own for input_ids, and this call has inputs_embeds, as "
                "virtual tokens are: give input_ids, or a mirror that shares the base's (shares=True, hidden=None)"
            )
        given = {k: t for k, t in given.items() if k != ("inputs_embeds" if own else "input_ids")}
        values = {k: t for k, t in p.items() if k.startswith((MIRROR, BUFFER))}
        values = {k.removeprefix(MIRROR).removeprefix(BUFFER).replace(DOT, "."): t for k, t in values.items()}
        past = cache(net.config)
        net.train(m.module.training)
        with swapped(net, values):
            given[cache_name(signature(net.forward).parameters)] = past
            states: Tensor = net(**given, use_cache=past is not None).last_hidden_state
        return F.linear(states, p["projection"]) if "projection" in p else states

    def into(self, p: Leaf, i: int, x: Tensor, state: Tensor) -> Tensor:
        return x + self.alpha * F.linear(F.linear(self.dropped(x - state), p["down"][i]), p["up"][i])

    def onward(self, p: Leaf, i: int, y: Tensor, state: Tensor) -> Tensor:
        new, gate = (_two_layers(p, net, i, y) for net in ("transform", "gate"))
        gate = gate.sigmoid()
        return (1 - gate) * state + gate * new


def _two_layers(p: Leaf, net: str, i: int, y: Tensor) -> Tensor:
    inner = F.gelu(F.linear(y, p[f"{net}_0"][i], p[f"{net}_b0"][i]))
    return F.linear(inner, p[f"{net}_1"][i], p[f"{net}_b1"][i])


def _each(n: int, draw: Callable[[], Tensor]) -> Tensor:
    return torch.stack([draw() for _ in range(n)])


def shadow_loss(
    net: Any, adapter: Any, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Return the loss of the mirror as a language model by itself: its states, through the base's head.

    Add it to the loss of the net, weighed (PEFT: 0.05), and the mirror learns to do without the base.

    Args:
        net, adapter: a net with one `Shadow`, and an adapter of it.
        input_ids: [rows, tokens].
        labels: [rows, tokens]; −100 does not count. They are shifted here, as transformers does.
        attention_mask: [rows, tokens].

    Returns:
        The mean cross entropy over all tokens that count.

    Raises:
        ValueError: the net has no `Shadow`, or several; or the model has no head for tokens.

    Example:
        from peftfn.methods.modules.shadow import shadow_loss
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval(), torch.tensor([[1, 2, 3]])
        net = pf.adapt(model, {"model": pf.Shadow(rank=4)})
        a = net.init(seed=0)
        loss = net.apply(a, ids, labels=ids).loss + 0.05 * shadow_loss(net, a, ids, ids)
    """
    found = [(n, e) for n, e in net.plan.items() if isinstance(e.method, Shadow)]
    head = net.model.get_output_embeddings() if hasattr(net.model, "get_output_embeddings") else None
    if len(found) != 1 or head is None:
        raise ValueError(f"shadow_loss: the net has {len(found)} sites with Shadow, and the model {head} as its head")
    ((name, entry),) = found
    m = Place.of(net.model, name, tokens=True)
    method, p = entry.tensors(adapter[name], {}, m)
    given = {"input_ids": input_ids, "inputs_embeds": _alone(net, adapter, m.embedding())(input_ids)}
    given |= {} if attention_mask is None else {"attention_mask": attention_mask}
    states = method.start({k: t.to(m.dtype) if k in entry.spec else t for k, t in p.items()}, m, given, lambda c: None)
    logits = _alone(net, adapter, head)(states)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _alone(net: Any, adapter: Any, layer: nn.Module) -> nn.Module:
    """A copy of a layer of the model, whose weights get no gradient and have what the net adds to them."""
    out = copy.copy(layer)
    name = next(n for n, module in net.model.named_modules(remove_duplicate=False) if module is layer)
    values: Any = {k: None if t is None else t.detach() for k, t in layer._parameters.items()}
    if (entry := net.plan.entries.get(f"{name}.weight")) is not None:
        w = entry.site.canonical(values["weight"])
        bank = adapter[entry.bank] if entry.bank else {}
        change = entry.delta(*entry.tensors(adapter[entry.site.name], bank, w), w)
        values["weight"] = values["weight"] + entry.site.original(change).to(w.dtype)
    out._parameters = values
    return out
