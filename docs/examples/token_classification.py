"""Token classification: a BERT marks the tokens between an opening and a closing one, with DoRA and a fresh head.

Labels of padding are −100, which the loss leaves out. With subwords, so are those of all pieces but a word's first.
"""

import torch
from transformers import BertConfig, BertForTokenClassification

import peftfn as pf

torch.manual_seed(0)
PAD, OPEN, CLOSE, WORDS = 0, 1, 2, 20
config = BertConfig(
    vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2,
    max_position_embeddings=16,
)  # fmt: skip
model = BertForTokenClassification(config)


def batch(n: int, length: int = 12) -> dict[str, torch.Tensor]:
    """Rows of words with one bracketed span, of several lengths."""
    ids, at = torch.randint(3, WORDS, (n, length)), torch.arange(length)
    start, size = torch.randint(0, 4, (n, 1)), torch.randint(1, 5, (n, 1))
    end, total = start + size + 1, torch.randint(9, length + 1, (n, 1))
    ids = ids.masked_fill(at == start, OPEN).masked_fill(at == end, CLOSE)
    inside, there = (at > start) & (at < end), at < total
    return {
        "input_ids": ids.masked_fill(~there, PAD),
        "attention_mask": there.long(),
        "labels": inside.long().masked_fill(~there, -100),
    }


net = pf.adapt(model, pf.targets(model, pf.DoRA(rank=8, alpha=16), "all-linear", task="TOKEN_CLS"))
assert not pf.check(net)  # a head that no rule trains would be a finding
a = net.init(seed=0)
step = pf.steps.adamw(5e-3)
state = step.init(a)
for _ in range(110):
    given = batch(32)
    gradient = torch.func.grad(lambda a, given=given: net.apply(a, **given).loss)(a)
    updates, state = step.update(gradient, state, a)
    a = pf.steps.apply(a, updates)

given = batch(200)
model.eval()
found = net.apply(a, **given).logits.argmax(-1)
right = (found == given["labels"])[given["labels"] >= 0].float().mean()
print(f"tokens right: {right:.2f}")
assert right > 0.9
