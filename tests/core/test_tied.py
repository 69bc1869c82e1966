"""One leaf for two tied weights is a function of an adapter, and what PEFT calls `ensure_weight_tying`."""

from typing import Any

import peft
import pytest
import torch
from support import close
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()


def both(leaf: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An embedding is seen as [dim, vocab], so the head's factors are transposed, and change places."""
    other = {"a": leaf["b"].mT, "b": leaf["a"].mT} if "a" in leaf else {"diff": leaf["diff"].mT}
    return {EMBED: leaf, HEAD: other}


IDS = torch.arange(12).view(2, 6)
METHODS = [pf.LoRA(rank=4, alpha=8), pf.Full()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_one_leaf_keeps_the_weights_tied(method: pf.Method) -> None:
    model = tied_llama()
    net = pf.adapt(model, {"embed_tokens|lm_head": method})
    leaf = {k: torch.randn_like(t) / 4 for k, t in net.init()[EMBED].items()}
    merged = net.merge(both(leaf))  # it raises where the two differ in one bit
    assert merged[EMBED] is merged[HEAD]
    loss = net.apply(both(leaf), IDS, labels=IDS).loss
    close(torch.func.functional_call(model, merged, (IDS,), {"labels": IDS}).loss, loss)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # which PEFT asks
def test_it_is_peft_s_ensure_weight_tying() -> None:
    model = tied_llama()
    net = pf.adapt(model, {"embed_tokens|lm_head": METHODS[0]})
    leaf = {k: torch.randn_like(t) / 4 for k, t in net.init()[EMBED].items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(tied_llama(), config).eval()
    embed, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    with torch.no_grad():  # the head's share this storage
        embed.lora_embedding_A["default"].copy_(leaf["a"])
        embed.lora_embedding_B["default"].copy_(leaf["b"])
    want = theirs(IDS, labels=IDS)
    close(net.apply(both(leaf), IDS, labels=IDS).logits, want.logits)
    want.loss.backward()
    gradient = torch.func.grad(lambda leaf: net.apply(both(leaf), IDS, labels=IDS).loss)(leaf)
    # PEFT's head has parameters of its own in this storage, each with a part of the gradient
    a = embed.lora_embedding_A["default"].grad + head.lora_B["default"].weight.grad.T
    b = embed.lora_embedding_B["default"].grad + head.lora_A["default"].weight.grad.T
    close(gradient["a"], a)
    close(gradient["b"], b)
