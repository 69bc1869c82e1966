"""transformers' own continuous batching over many adapters: each request has the tokens that `generate` gives it."""

from typing import Any

import pytest
import torch
import transformers as tf
from support import random

import peftfn as pf

TEXT = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None},
}
NEW = 3
ALL = {"q_proj|v_proj|o_proj|mlp": pf.LoRA(2)}


def model(kind: str = "Llama", attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    made = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**TEXT, **more)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.dim() > 1 else None
    made.set_attn_implementation(attention)
    return made


def prompts(n: int) -> list[list[int]]:
    """Some begin with the same tokens, longer than a block: what a cache by tokens alone would share."""
    g = torch.Generator().manual_seed(1)
    common = torch.randint(2, 64, (18,), generator=g).tolist()
    drawn = [torch.randint(2, 64, (1 + i % 9,), generator=g).tolist() for i in range(n)]
    return [common + p if i % 4 == 0 else p for i, p in enumerate(drawn)]


def alone(net: pf.Adapted, adapter: Any, prompt: list[int]) -> list[int]:
    how = {"max_new_tokens": NEW, "do_sample": False}
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = net.apply(adapter, ids, method="generate", **how) if adapter else net.model.generate(ids, **how)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def manager_of(served: pf.Continuous) -> Any:
    generation = tf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = tf.ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64)
    return served.init_continuous_batching(generation, config)


def serve(served: pf.Continuous, requests: list[tuple[list[int], Any]]) -> list[list[int]]:
    manager, results = manager_of(served), {}
    assert not manager.continuous_batching_config.allow_block_sharing
    manager.start()
    try:
        names = [served.add_request(ids, adapter, max_new_tokens=NEW) for ids, adapter in requests]
        while len(results) < len(names):
            result = manager.get_result(timeout=20)
            assert result is not None, "the manager gives no more results"
            assert result.error is None, result.error
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True, timeout=20)
    return [results[name] for name in names]


def test_a_hundred_requests_over_twenty_adapters_are_each_what_generate_gives() -> None:
    base = model()
    net, other = pf.adapt(base, ALL), pf.adapt(base, {"mlp": pf.DoRA(3), "q_proj": pf.IA3()})
    adapters = {f"user {i}": (n, random(n, i)) for i in range(20) for n in [other if i % 5 == 0 else net]}
    bank = pf.bank(adapters)
    names = [f"user {i % 20}" if i % 11 else None for i in range(100)]
    asked = prompts(100)
    got = serve(pf.continuous(bank), list(zip(asked, names, strict=True)))
    want = [alone(*(adapters[n] if n else (net, None)), p) for n, p in zip(names, asked, strict=True)]
    assert got == want
    plain = [alone(net, None, p) for p in asked[:10]]
    assert sum(a != b for a, b in zip(want, plain, strict=False)) > 4, "the adapters do nothing: this would be no check"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("whole", [False, True], ids=["parts", "the whole model"])
def test_a_net_with_experts_is_driven_too(attention: str, whole: bool) -> None:
    """The output layer sees chosen tokens alone, so where it is adapted the whole model is routed."""
    more = {"embed_tokens|lm_head": pf.LoRA(2)} if whole else {}
    net = pf.adapt(model("Mixtral", attention), ALL | more, routed=[""] if whole else None)
    adapters = [random(net, s) for s in range(3)]
    asked, index = prompts(7), [2, -1, 0, 2, 1, -1, 0]
    got = serve(pf.continuous(net, pf.stack(adapters)), list(zip(asked, index, strict=True)))
    assert got == [alone(net, adapters[k] if k >= 0 else None, p) for k, p in zip(index, asked, strict=True)]
    assert net.model.config._attn_implementation == attention


def test_activated_loras_act_from_their_invocation_on_beside_others() -> None:
    """Each request is what generate gives: those with the invocation early, late and never."""
    base = model()
    nets = {"one": {"q_proj|v_proj": pf.ALoRA(2, invocation=(7, 9))}, "plain": ALL}
    held = {n: (net := pf.adapt(base, rules), random(net, i, scale=0.4)) for i, (n, rules) in enumerate(nets.items())}
    asked = [[7, 9, *p] if i % 3 == 0 else [*p, 7, 9, 5] if i % 3 == 1 else p for i, p in enumerate(prompts(9))]
    names = ["one", "one", "one", "plain", None, "one", "one", "one", "plain"]
    want = [alone(*(held[n] if n else (held["one"][0], None)), p) for n, p in zip(names, asked, strict=True)]
    assert serve(pf.continuous(pf.bank(held)), list(zip(asked, names, strict=True))) == want
    net, a = held["one"]
    got = serve(pf.continuous(net, pf.stack([a])), [(p, 0) for p, n in zip(asked, names, strict=True) if n == "one"])
    assert got == [w for w, n in zip(want, names, strict=True) if n == "one"]
    some = pf.adapt(base, {"q_proj": pf.ALoRA(2), "mlp": pf.LoRA(2)})
    with pytest.raises(ValueError, match=r"ALoRA.*q_proj.*some tokens alone.*LoRA.*mlp.*on others"):
        pf.continuous(some, pf.stack([some.init()]))


def test_what_a_request_asks_for_is_checked_before_it_is_added() -> None:
    net = pf.adapt(model(), ALL)
    adapters = {f"user {i}": random(net, i) for i in range(3)}
    bank = pf.Bank([net], capacity=2)
    for name, a in adapters.items():
        bank.put(name, net, a)
    served = pf.continuous(bank)
    with pytest.raises(ValueError, match="call init_continuous_batching first"):
        served.add_request([3], "user 0")
    manager = manager_of(served)
    with pytest.raises(ValueError, match="has a manager already"):
        manager_of(served)
    with pytest.raises(KeyError, match=r"no adapter 'user 9'; near: user"):
        served.add_request([3], "user 9")
    served.add_request([3], "user 0", request_id="one")
    with pytest.raises(ValueError, match="there is a request 'one' already"):
        served.add_request([3], "user 1", request_id="one")
    served.add_request([3], "user 1")
    with pytest.raises(ValueError, match=r"'user 2': the batch names 3 adapters of one net, and the bank has 2 slots"):
        served.add_request([3], "user 2")
    with pytest.raises(AttributeError, match="would run without adapters"):
        served.generate  # noqa: B018
    manager.add_request(input_ids=[3], request_id="stray")
    manager.start()
    try:
        failed = manager.get_result(timeout=20)
        assert "request 'stray' was added without an adapter" in failed.error
    finally:
        manager.stop(block=True, timeout=20)
    with pytest.raises(ValueError, match="give the net's adapters"):
        pf.continuous(net)
    with pytest.raises(ValueError, match="a bank has its adapters itself"):
        pf.continuous(bank, pf.stack([*adapters.values()]))
    with pytest.raises(TypeError, match="this is a LlamaForCausalLM"):
        pf.continuous(net.model)
    stacked = pf.continuous(net, pf.stack([*adapters.values()]))
    manager_of(stacked)
    with pytest.raises(ValueError, match=r"there is no adapter 3; the stack has 3"):
        stacked.add_request([3], 3)
    net.model.train()
    with pytest.raises(ValueError, match="training mode"):
        manager_of(pf.continuous(bank))
