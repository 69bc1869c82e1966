"""Methods at modules and on inputs, each on a Llama, GPT-2, BERT and T5: rows of a batch, gradients, `generate`."""

from typing import Any

import pytest
import torch
import transformers as tf
from support import random, rows_are_alone
from torch import Tensor

import peftfn as pf
from peftfn.core.method import Weight, registry

IDS = torch.randint(3, 24, (4, 6), generator=torch.Generator().manual_seed(0))
INDEX = [2, -1, 0, 1]
END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(name: str) -> Any:
    torch.manual_seed(0)
    made: Any
    if name == "llama":
        made = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=24, **SIZE, **END))
    elif name == "gpt2":
        made = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64, **END))
    elif name == "bert":
        made = tf.BertForMaskedLM(tf.BertConfig(vocab_size=24, **SIZE))
    else:
        config = tf.T5Config(vocab_size=24, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
        config.decoder_start_token_id, config.eos_token_id = 0, None
        made = tf.T5ForConditionalGeneration(config)
    return made.requires_grad_(False).eval()


WHERE: dict[str, dict[str, str]] = {
    "llama": {
        "block": r"layers\.\d+", "mlp": "mlp", "attention": "self_attn", "embedding": "embed_tokens", "model": "model",
        "below": "layers.0", "last": "layers.1",
    },
    "gpt2": {
        "block": r"h\.\d+", "mlp": "mlp", "attention": "attn", "embedding": "wte", "model": "transformer",
        "below": "h.0", "last": "h.1",
    },
    "bert": {
        "block": r"layer\.\d+", "mlp": r"layer\.\d+\.output", "attention": "attention", "embedding": "word_embeddings",
        "model": "bert", "below": "layer.0", "last": "layer.1",
    },
    "t5": {
        "block": r"decoder.block\.\d+", "mlp": "DenseReluDense", "attention": "SelfAttention", "embedding": "shared",
        "model": "encoder", "below": "encoder.block.0", "last": "encoder.block.1",
    },
}  # fmt: skip
METHODS: dict[str, dict[str, pf.Method]] = {
    "Bottleneck": {"mlp": pf.Bottleneck(2)},
    "AdapterPlus": {"mlp": pf.AdapterPlus(rank=3)},
    "Compacter": {"mlp": pf.Compacter(rank=4, n=2, spread=0.3)},
    "LoReFT": {"block": pf.LoReFT(2, first=2, last=1, tied=False)},
    "NoReFT": {"block": pf.NoReFT(2, last=1)},
    "DiReFT": {"block": pf.DiReFT(2, first=1)},
    "ConsReFT": {"block": pf.ConsReFT(2)},
    "LobiReFT": {"block": pf.LobiReFT(2)},
    "ModuleChain": {"mlp": pf.chain(pf.Bottleneck(2), pf.LoReFT(2))},
    "AdapterFusion": {"mlp": pf.AdapterFusion(2, of=pf.Bottleneck(2))},
    "LayerGate": {"block": pf.LayerGate()},
    "LayerDrop": {"block": pf.LayerDrop(0.5), "mlp": pf.Bottleneck(2)},
    "NEFTune": {"embedding": pf.NEFTune(), "mlp": pf.Bottleneck(2)},
    "SCETuning": {"mlp": pf.SCETuning(ratio=0.5)},
    "Side": {"mlp": pf.Side()},
    "ResTuning": {"last": pf.ResTuning(("below",), rank=2)},
    "LlamaPro": {"last": pf.LlamaPro()},
    "LlamaAdapter": {"attention": pf.LlamaAdapter(n=2)},
    "Shadow": {"model": pf.Shadow(rank=2)},
    "PromptTuning": {"model": pf.PromptTuning(3)},
    "PTuning": {"model": pf.PTuning(3)},
    "MultitaskPrompt": {"model": pf.MultitaskPrompt(3)},
    "CPT": {"model": pf.CPT((5, 6, 7))},
    "DeepPrompt": {"model": pf.PromptTuning(3), "last": pf.DeepPrompt(3)},
    "PrefixTuning": {"model": pf.PrefixTuning(2)},
    "Cartridge": {"model": pf.Cartridge(3)},
}
"""Method → where it goes and with what."""
ZEROED = {"gpt2": ("c_proj",), "t5": ("o", "wo")}
"""The last parts of a block's residual branches, where they are not called as in a Llama."""
REFUSED = {
    ("LlamaAdapter", "bert"): "an attention made as Llama's",
    ("LlamaAdapter", "t5"): "an attention made as Llama's",
    ("LlamaPro", "bert"): "has no o_proj, down_proj",  # its branches end in a norm: no block of it is the identity
    ("PrefixTuning", "t5"): "leaves no cache of keys and values",  # its encoder
    ("Cartridge", "t5"): "leaves no cache of keys and values",
    ("Shadow", "bert"): "the blocks of a causal language model",
    ("Shadow", "t5"): "the blocks of a causal language model",
}
"""What has no meaning at a model → what its error says."""


def rules(name: str, kind: str) -> dict[str, pf.Method]:
    """A row of `METHODS` with the module names of a model."""
    out: dict[str, pf.Method] = {}
    for at, method in METHODS[name].items():
        if isinstance(method, pf.ResTuning):
            method = pf.ResTuning((WHERE[kind]["below"],), rank=2)
        if isinstance(method, pf.LlamaPro) and kind in ZEROED:
            method = pf.LlamaPro(zeroed=ZEROED[kind])
        out[WHERE[kind][at] if at in ("block", "embedding", "mlp", "attention") else f"{WHERE[kind][at]}$"] = method
    return out


def test_the_table_has_every_method() -> None:
    ours = {n for n, c in registry.items() if not issubclass(c, Weight) and c.__module__.startswith("peftfn.")}
    assert ours == METHODS.keys()


@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_batch_are_each_row_alone(name: str, kind: str) -> None:
    base = model(kind)
    if (name, kind) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, kind]):
            pf.adapt(base, rules(name, kind)).init()
        return
    more = {"decoder_input_ids": IDS[:, :3]} if kind == "t5" else {}
    net = pf.adapt(base, rules(name, kind))
    adapters = [random(net, i, scale=0.3) for i in range(3)]
    stack = pf.stack(adapters)

    def row(a: Any, i: int) -> Tensor:
        given = {"input_ids": IDS[i : i + 1], **{k: v[i : i + 1] for k, v in more.items()}}
        out: Tensor = (base(**given) if a is None else net.apply(a, **given)).logits
        return out[:, -next(reversed(given.values())).shape[1] :]  # CPT keeps the states of its context

    def rows(s: Any) -> Tensor:
        out: Tensor = net.mixed(s, INDEX, IDS, **more).logits
        return out

    rows_are_alone(INDEX, adapters, row, rows)
    if kind != "bert":
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        got = net.mixed(stack, INDEX, IDS, method="generate", **options)
        for i, k in enumerate(INDEX):
            ids = IDS[i : i + 1]
            one = base.generate(ids, **options) if k < 0 else net.apply(adapters[k], ids, method="generate", **options)
            assert torch.equal(got[i : i + 1], one)
