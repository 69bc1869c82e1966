"""Fine-tune with a plain loop: a language model that writes in capitals."""

import torch
from base import batch, decode, encode, model

import peftfn as pf

net = pf.adapt(model, {r"(q|k|v|o|up|down|gate)_proj": pf.LoRA(rank=8, alpha=16)})
a = net.init(seed=0)
print(pf.summary(net, by_site=False))

leaves = pf.leaves(a)
optimizer = torch.optim.AdamW([t.requires_grad_() for t in leaves], lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=120)
held_out = batch(32, step=-1, style=str.upper)

for step in range(120):
    ids = batch(16, step, str.upper)
    loss = net.apply(a, ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    optimizer.step()
    schedule.step()
    if step % 40 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

with torch.no_grad():
    before = model(held_out, labels=held_out).loss.item()
    after = net.apply(a, held_out, labels=held_out).loss.item()
prompt = encode("THE STATEMENT ")[None]
text = net.apply(a, prompt, max_new_tokens=40, do_sample=False, method="generate")
print(f"held out: {before:.2f} before, {after:.2f} after\n{decode(text[0])!r}")
assert after < 0.6 * before

pf.save("capitals", net, a, format="peft")  # PEFT loads it too
