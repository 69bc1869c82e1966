"""Fine-tune with transformers' Trainer: it trains a module, and its checkpoints hold the adapter alone."""

import transformers
from base import batch, model

import peftfn as pf

net = pf.adapt(model, {r"(q|v|up|down)_proj": pf.DoRA(rank=8, alpha=16)})
m = pf.as_module(net, net.init(seed=0))

ids = batch(256, step=0, style=str.upper)
rows = [{"input_ids": row, "labels": row} for row in ids]
options = transformers.TrainingArguments(
    "run",
    learning_rate=1e-2,
    per_device_train_batch_size=16,
    num_train_epochs=4,
    save_strategy="epoch",
    save_total_limit=1,
    logging_steps=16,
    use_cpu=True,
    report_to=[],
)
trainer = transformers.Trainer(m, options, train_dataset=rows)
result = trainer.train()
print(f"loss {result.training_loss:.2f} over {result.global_step} steps")

checkpoint = transformers.trainer_utils.get_last_checkpoint("run")
again, a = pf.load(checkpoint, model)  # a checkpoint is an adapter
held_out = batch(32, step=-1, style=str.upper)
before, after = model(held_out, labels=held_out).loss.item(), again.apply(a, held_out, labels=held_out).loss.item()
print(f"held out: {before:.2f} before, {after:.2f} after")
assert after < 0.7 * before
