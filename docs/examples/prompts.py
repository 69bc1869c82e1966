"""Prompt tuning and prefix tuning: nothing of the model's weights changes, only what stands before the input."""

import torch
from base import batch, decode, encode, model

import peftfn as pf

METHODS = {"prompt": pf.PromptTuning(n=16), "prefix": pf.PrefixTuning(n=8)}
held_out = batch(32, step=-1, style=str.upper)
before = model(held_out, labels=held_out).loss.item()
trained = {}
for name, method in METHODS.items():
    net = pf.adapt(model, {".*": method})  # ".*" finds the backbone
    a = net.init(seed=0)
    optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=5e-2)
    for step in range(100):
        ids = batch(16, step, str.upper)
        loss = net.apply(a, ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained[name] = net, a
    after = net.apply(a, held_out, labels=held_out).loss.item()
    text = decode(net.apply(a, encode("THE ")[None], max_new_tokens=20, do_sample=False, method="generate")[0])
    print(f"{name}: {sum(t.numel() for t in pf.leaves(a)):,} numbers, {before:.2f} → {after:.2f}  {text!r}")
    assert after < 0.9 * before

bank = pf.bank(trained)  # one batch: a row with the prompt, one with the prefix, one without
ids = encode("THE VALUE ").expand(3, -1)
texts = bank.apply(["prompt", "prefix", "__base__"], ids, max_new_tokens=20, do_sample=False, method="generate")
for (net, a), ids in zip(trained.values(), texts[:2], strict=True):
    alone = net.apply(a, encode("THE VALUE ")[None], max_new_tokens=20, do_sample=False, method="generate")
    assert torch.equal(ids, alone[0])
pf.save("prompt", *trained["prompt"], format="peft")
