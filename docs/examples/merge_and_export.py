"""Fold an adapter into a copy of the model, check what that costs, and export it for machines without peftfn."""

import torch
import transformers
from base import batch, model

import peftfn as pf

net = pf.adapt(model, {r"(q|k|v|o)_proj": pf.LoRA(rank=8, init_weights="random")})
a = net.init(seed=0)
print(pf.merge_report(net, a))

plain = pf.merged_model(net, a)  # a LlamaForCausalLM; `model` keeps its weights
plain.save_pretrained("merged")
ids = batch(2, step=0, length=16)
want = net.apply(a, ids).logits
again = transformers.AutoModelForCausalLM.from_pretrained("merged")
torch.testing.assert_close(again(ids).logits, want, atol=1e-4, rtol=1e-4)

program = torch.export.export(plain, (ids,), {"use_cache": False})
torch.export.save(program, "merged.pt2")
logits = torch.export.load("merged.pt2").module()(ids, use_cache=False).logits
torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
print("the folder and the exported program give what net.apply gives")
