"""Serve many adapters from a bank: requests of different adapters share a batch, and new ones arrive meanwhile."""

from concurrent.futures import ThreadPoolExecutor

import torch
from base import encode, model

import peftfn as pf

plain = pf.adapt(model, {r"(q|v)_proj": pf.LoRA(rank=4, init_weights="random")})
wide = pf.adapt(model, {r"(q|k|v|o)_proj": pf.DoRA(rank=2, init_weights="random")})
bank = pf.Bank([plain, wide], capacity=4)  # 4 adapters of each kind are in memory at a time
for i in range(12):
    net = (plain, wide)[i % 2]
    pf.save(f"users/{i}", net, net.init(seed=i))
    bank.put(f"user {i}", net, f"users/{i}")  # read when a batch names it


def generate(net, a, ids):
    return net.apply(a, ids, max_new_tokens=8, do_sample=False, method="generate")


def serve(names):
    ids = encode("The value of the ").expand(len(names), -1)
    return bank.apply(names, ids, max_new_tokens=8, do_sample=False, method="generate", timeout=60)


def arrive(i):
    bank.put(f"late {i}", plain, plain.init(seed=100 + i))


requests = [[f"user {i}", "__base__", f"user {(i + 3) % 12}", f"user {(i + 6) % 12}"] for i in range(12)]
with ThreadPoolExecutor(4) as pool:
    arrivals = [pool.submit(arrive, i) for i in range(6)]
    answers = list(pool.map(serve, requests))
assert all(f.exception() is None for f in arrivals)

ids = encode("The value of the ")[None]
for names, answer in zip(requests, answers, strict=True):
    for name, text in zip(names, answer, strict=True):
        if name == "__base__":
            alone = model.generate(ids, max_new_tokens=8, do_sample=False)
        else:
            alone = generate(*pf.load(f"users/{name.split()[1]}", model), ids)
        assert torch.equal(text, alone[0]), name
print(bank)
