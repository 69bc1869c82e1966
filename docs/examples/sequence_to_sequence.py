"""Sequence to sequence: a T5 learns to translate words, with LoRA in a module view and a torch optimizer; generate.

An untrained base knows nothing, so its embedding is trained too; a pretrained one needs the LoRA alone.
"""

import torch
from transformers import T5Config, T5ForConditionalGeneration

import peftfn as pf

torch.manual_seed(0)
PAD, END, WORDS = 0, 1, 14
config = T5Config(
    vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, pad_token_id=PAD,
    eos_token_id=END, decoder_start_token_id=PAD, tie_word_embeddings=False,
)  # fmt: skip
model = T5ForConditionalGeneration(config)


def batch(n: int) -> dict[str, torch.Tensor]:
    """A word, and its translation, which has two. (Labels that are padding would be −100.)"""
    word, end = torch.randint(2, WORDS, (n, 1)), torch.full((n, 1), END)
    first, second = ((word - 2 + k) % (WORDS - 2) + 2 for k in (3, 7))
    return {"input_ids": torch.cat([word, end], 1), "labels": torch.cat([first, second, end], 1)}


rules = {"shared|lm_head": pf.Full(), **pf.targets(model, pf.LoRA(rank=16, alpha=32), ["q", "k", "v", "o", "wi", "wo"])}
net = pf.adapt(model, rules)
m = pf.as_module(net, net.init(seed=0))  # an nn.Module: Seq2SeqTrainer takes it as it is
optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3)
for _ in range(200):
    loss = m(**batch(32)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

m.eval()
given = batch(50)
out = m.generate(input_ids=given["input_ids"], max_new_tokens=3, do_sample=False)
right = float((out[:, 1:] == given["labels"]).all(-1).float().mean())
print(f"loss {loss.item():.3f}, translated in full: {right:.2f}")
assert right > 0.9
