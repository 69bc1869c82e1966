"""Deep prompts: states in place of virtual tokens', alone, mixed, and in generation."""

from typing import Any

import pytest
import torch
import transformers as tf

import peftfn as pf

IDS = torch.tensor([[5, 6, 7, 8], [4, 4, 9, 2], [9, 8, 7, 6]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
KINDS: dict[str, tuple[Any, str]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, **END)), r"layers\.[12]"),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZE)), r"encoder\.layer\.[12]"),
}


def two(name: str) -> tuple[Any, list[pf.Adapted], list[Any]]:
    torch.manual_seed(0)
    make, layers = KINDS[name]
    model = make().eval().requires_grad_(False)
    nets = [
        pf.adapt(model, {name if name == "bert" else "model": pf.PromptTuning(n=n), layers: pf.DeepPrompt(n=n)})
        for n in (2, 4)
    ]
    return model, nets, [net.init(seed=i) for i, net in enumerate(nets)]


@pytest.mark.parametrize("name", KINDS)
def test_the_states_of_virtual_tokens_are_replaced(name: str) -> None:
    model, (net, _), (a, _) = two(name)
    site = next(s for s in net.plan if isinstance(net.plan[s].method, pf.PromptTuning))
    layers = [model.get_submodule(s) for s in net.plan if s != site]
    states = [a[s]["tokens"] for s in net.plan if s != site]

    def put(p: Any) -> Any:
        def hook(_: Any, args: Any) -> Any:
            return (torch.cat([p.expand(3, -1, -1), args[0][:, 2:]], 1), *args[1:])

        return hook

    alone = pf.adapt(model, {site: pf.PromptTuning(n=2)})
    got = net.apply(a, input_ids=IDS).logits
    hooks = [layer.register_forward_pre_hook(put(p)) for layer, p in zip(layers, states, strict=True)]
    embedded = torch.cat([a[site]["tokens"].expand(3, -1, -1), model.get_input_embeddings()(IDS)], 1)
    want = model(inputs_embeds=embedded).logits[:, 2:]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got - alone.apply({site: a[site]}, input_ids=IDS).logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_other_numbers_and_none_are_as_alone(name: str) -> None:
    model, nets, adapters = two(name)
    mask = LEFT if name == "llama" else LEFT.flip(1)
    more = {"input_ids": IDS, "attention_mask": mask}
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [1, -1, 0], **more).logits
    one, other = (net.apply(a, **more).logits for net, a in zip(nets, adapters, strict=True))
    want = torch.stack([other[0], model(**more).logits[1], one[2]])
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=2e-5)


def test_generation_of_mixed_rows_is_that_of_each_with_a_cache_or_without() -> None:
    model, nets, adapters = two("llama")
    more: Any = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, **END}
    run = lambda net, a, **x: net.apply(a, method="generate", **x, **more)  # noqa: E731
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [1, -1, 0], method="generate", **more)
    one, other = (run(net, a) for net, a in zip(nets, adapters, strict=True))
    assert torch.equal(got, torch.stack([other[0], model.generate(**more)[1], one[2]]))
    assert torch.equal(one, run(nets[0], adapters[0], use_cache=False))
