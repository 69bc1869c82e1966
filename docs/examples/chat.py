"""Chat: a Llama learns two personas from conversations; the loss counts the answers alone. One batch serves both.

With a tokenizer, ids come from tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, …).
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

torch.manual_seed(0)
USER, ASSISTANT, WORDS = 1, 2, 20
config = LlamaConfig(
    vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
model = LlamaForCausalLM(config)


def conversation(n: int, shift: int) -> dict[str, torch.Tensor]:
    """User: a word. Assistant: the word that is `shift` further. The labels of the user's turn are −100."""
    asked = torch.randint(3, WORDS, (n, 1))
    answer = (asked - 3 + shift) % (WORDS - 3) + 3
    ids = torch.cat([torch.full((n, 1), USER), asked, torch.full((n, 1), ASSISTANT), answer], 1)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(4) < 3, -100)}


net = pf.adapt(model, {"embed_tokens|lm_head": pf.Full(), **pf.targets(model, pf.LoRA(rank=8), "all-linear")})
step = pf.steps.adamw(1e-2)


def trained(shift: int, seed: int) -> pf.Adapter:
    a = net.init(seed)
    state = step.init(a)
    for _ in range(60):
        given = conversation(32, shift)
        gradient = torch.func.grad(lambda a, given=given: net.apply(a, **given).loss)(a)
        updates, state = step.update(gradient, state, a)
        a = pf.steps.apply(a, updates)
    return a


personas = pf.stack([trained(1, seed=0), trained(5, seed=1)])
ids = conversation(40, 0)["input_ids"][:, :3]  # a prompt, up to the assistant's turn
who = [i % 2 for i in range(40)]  # the persona that answers each row
model.generation_config.pad_token_id = 0
out = net.mixed(personas, who, ids, method="generate", max_new_tokens=1, do_sample=False)
want = (ids[:, 1] - 3 + torch.tensor([1, 5])[who]) % (WORDS - 3) + 3
right = float((out[:, 3] == want).float().mean())
print(f"answers right: {right:.2f}")
assert right > 0.9
