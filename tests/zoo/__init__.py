"""Real architectures, tiny and random, built offline from their configurations, and what must hold on each.

shrink.py   a configuration class → a small configuration of it
inputs.py   a model → inputs that it takes
rows.py     what needs a hand: torch.nn, diffusers, timm, models of several parts
build.py    a kind's name → a `Subject`: model, inputs, how to take a row of them
checks.py   one function a law, each of one `Subject`
outcome.py  a subject and a check → holds, refused, fails or does not apply
known.py    known.json: what fails today, and what does not apply
sweep.py    many kinds, each in a process of its own; `python -m zoo` (make zoo) is the command
"""
