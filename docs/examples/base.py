"""What stands for a model of yours: a tiny Llama that has learnt to spell, from the help texts that Python ships.

The other examples adapt it. It trains in a few seconds, once a process, and none of them changes it.
"""

from pydoc_data.topics import topics

import torch
import transformers

TEXT = "\n".join(topics.values())
LETTERS = "\0" + "".join(sorted({c for c in TEXT + TEXT.upper() if c.isascii()}))  # number 0 is the padding


def encode(text):
    return torch.tensor([LETTERS.index(c) for c in text if c in LETTERS])


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def batch(rows, step, style=str, length=48):
    """[rows, length] characters from anywhere in the text, rewritten by `style`: others for each step."""
    starts = torch.randint(len(TEXT) - 2 * length, (rows,), generator=torch.Generator().manual_seed(step))
    return torch.stack([encode(style(TEXT[s : s + 2 * length]))[:length] for s in starts.tolist()])


def pretrained(steps=150):
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids = batch(16, step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


model = pretrained()
