"""QLoRA: train on a base in 4 bits, then use the adapter on the base in full precision."""

import torch
import transformers
from base import batch, model

import peftfn as pf

model.save_pretrained("base")  # stands for a model of the hub
bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
small = transformers.AutoModelForCausalLM.from_pretrained("base", quantization_config=bits, device_map={"": "cpu"})

net = pf.adapt(small, {r"(q|k|v|o|up|down|gate)_proj": pf.LoRA(rank=8, alpha=16)})
a = net.init(seed=0)
optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=1e-2)
for step in range(40):
    ids = batch(16, step, str.upper)
    loss = net.apply(a, ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
pf.save("adapter", net, a, format="peft")

held_out = batch(32, step=-1, style=str.upper)
whole, a = pf.load("adapter", model)  # the same sites, in fp32
losses = {
    "4 bits": small(held_out, labels=held_out).loss,
    "4 bits, adapted": net.apply(a, held_out, labels=held_out).loss,
    "fp32, adapted": whole.apply(a, held_out, labels=held_out).loss,
}
print({name: round(loss.item(), 2) for name, loss in losses.items()})
assert losses["fp32, adapted"] < 0.7 * losses["4 bits"]
