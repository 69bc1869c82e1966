"""What the tests of serving share: a tiny Llama with a tokenizer, adapters in folders, and what `generate` says."""

import queue
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
import transformers as tf
from support import random
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import peftfn as pf
from peftfn.serving.adapters import Adapters
from peftfn.serving.engine import Engine
from peftfn.serving.ticket import Ask, Piece

SIZE = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None},
}
RULES = {"q_proj|v_proj|o_proj|mlp": pf.LoRA(2)}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, a few pairs of them, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<end>", *alphabet, "th", "he", "Ġa"]
    merges = [("t", "h"), ("h", "e"), ("Ġ", "a")]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    out.chat_template = CHAT
    return out


def model(end: int | None = 1, **more: Any) -> Any:
    torch.manual_seed(0)
    made = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=261, eos_token_id=end, **SIZE | more)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.25) if p.dim() > 1 else None
    return made


def folders(root: Path, base: Any, count: int = 3) -> dict[str, tuple[pf.Adapted, pf.Adapter]]:
    """Adapters "user0", … in folders of the root: PEFT's and ours in turn, of two ranks."""
    root.mkdir(exist_ok=True)
    made = {}
    for i in range(count):
        net = pf.adapt(base, {"q_proj|v_proj|o_proj|mlp": pf.LoRA(2 if i % 3 else 3)})
        made[f"user{i}"] = net, random(net, i, scale=0.3)
        pf.save(root / f"user{i}", *made[f"user{i}"], format="peft" if i % 2 else "native")
    return made


def alone(net: pf.Adapted, adapter: Any, prompt: Sequence[int], new: int) -> list[int]:
    """What `generate` gives with an adapter; None: without."""
    how = {"max_new_tokens": new, "do_sample": False}
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = net.apply(adapter, ids, method="generate", **how) if adapter else net.model.generate(ids, **how)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def prompts(n: int, seed: int = 1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 261, (1 + (5 * i) % 23,), generator=g).tolist() for i in range(n)]


def engine(base: Any, root: Path | None, *, text: bool = True, slots: int = 8, plans: int = 4, **more: Any) -> Engine:
    options = {"rows": 4} | more
    return Engine(base, Adapters(base, root, slots=slots, plans=plans), tokenizer() if text else None, **options)


class Answer:
    """The pieces of one answer, as they come."""

    def __init__(self, engine: Engine, ask: Ask):
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.ticket = engine.submit(ask, self.put)

    def put(self, piece: Piece) -> None:
        self._pieces.put(piece)

    def next(self) -> Piece:
        return self._pieces.get(timeout=60)

    def empty(self) -> bool:
        return self._pieces.empty()

    def all(self) -> list[Piece]:
        out = [self.next()]
        while not (out[-1].finish or out[-1].error):
            out.append(self.next())
        return out

    def tokens(self) -> list[int]:
        pieces = self.all()
        assert pieces[-1].error is None, pieces[-1].error
        return [t for p in pieces for t in p.tokens]


class Held(Answer):
    """An answer whose engine waits in front of the second token until it is let go."""

    def __init__(self, engine: Any, ask: Ask):
        self._go, self._first = Event(), True
        super().__init__(engine, ask)

    def put(self, piece: Piece) -> None:
        super().put(piece)
        if self._first:
            self._first = False
            assert self._go.wait(30)

    def go(self) -> None:
        self._go.set()
