"""A soak of `peftfn serve`: python -m benchmarks.soak --requests 100000 --minutes 10 writes results/serving/soak.json.

The server is a process of its own, on loopback, with 1,000 adapters in its directory and slots for 64 of them. Clients
ask it for greedy answers, whole or streamed, of adapters drawn with a Zipf-like skew; every answer is compared token by
token with what `generate` gave for that adapter alone, before the server started. Some clients go away in the middle of
an answer, some ask for adapters that are not there, and one adds and removes adapters all the time. The server's memory
is sampled every few seconds, and its processor time is counted, which other work on the machine changes little. At the
end it prints what docs/serving.md has to say of the new record.

One client is the way to see what a request takes that has the server to itself:
python -m benchmarks.soak --clients 1 --minutes 1 --out one.json
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import torch
from optree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import peftfn as pf
from benchmarks.harness import RESULTS, Json, Options, environment

OUT = RESULTS / "serving" / "soak.json"
SITES = "q_proj|v_proj|o_proj|mlp"
VOCABULARY, LONGEST, PROMPTS = 256, 8, 2
"""The tokens that there are, those of the longest answer, and the prompts of an adapter whose answers are known."""
GOES_AWAY, UNKNOWN, STREAMED = 0.01, 0.01, 0.3
"""Shares of requests."""
Known = dict[str, list[tuple[list[int], list[int]]]]
"""adapter → (prompt, answer) of each of its prompts"""


@dataclass
class Tally:
    """What came of the requests."""

    limit: int
    end: float
    asked: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds since the start, MiB)
    processor: float = 0.0  # seconds of the server's threads

    def another(self) -> bool:
        if self.asked >= self.limit or monotonic() > self.end:
            return False
        self.asked += 1
        return True


def made(folder: Path, adapters: int) -> Known:
    """Write a base and its adapters: of two ranks, every tenth in PEFT's format. Returns their answers."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=None, pad_token_id=0, **size)
    base = LlamaForCausalLM(config).eval()
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
    base.save_pretrained(folder / "base")
    nets = [pf.adapt(base, {SITES: pf.LoRA(rank)}) for rank in (4, 8)]
    known: Known = {}
    for i in range(adapters):
        draw, name = torch.Generator().manual_seed(i), f"user{i:04}"
        net = nets[i % 2]
        a = tree_map(lambda t, g=draw: t + 0.2 * torch.randn(t.shape, generator=g), net.init(i))  # type: ignore[misc]
        pf.save(folder / "adapters" / name, net, a, format="native" if i % 10 else "peft")  # type: ignore[arg-type]
        asked = [torch.randint(1, VOCABULARY, (1 + (i + 7 * k) % 40,), generator=draw).tolist() for k in range(PROMPTS)]
        known[name] = [(ids, _alone(net, a, ids)) for ids in asked]
    return known


@torch.inference_mode()
def _alone(net: pf.Adapted, adapter: Any, ids: list[int]) -> list[int]:
    how = {"method": "generate", "max_new_tokens": LONGEST, "do_sample": False}
    out: list[int] = net.apply(adapter, torch.tensor([ids]), **how)[0, len(ids) :].tolist()
    return out


@contextmanager
def serving(folder: Path, resident: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server."""
    command = [sys.executable, "-m", "peftfn", "serve", str(folder / "base"), "--adapters", str(folder / "adapters")]
    options = ["--port", "0", "--resident", str(resident), "--rows", "32", "--queue", "48", "--device", "cpu"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=one)
    assert process.stdout is not None
    try:
        said = process.stdout.readline().split()
        if len(said) < 5:
            raise RuntimeError("the server did not start")
        yield said[4].removesuffix("/v1,"), process.pid
    finally:
        process.terminate()
        if process.wait(timeout=60):
            raise RuntimeError(f"the server ended with {process.returncode}")


async def client(http: httpx.AsyncClient, known: Known, tally: Tally, draw: random.Random) -> None:
    """One request after the other."""
    names = list(known)
    while tally.another():
        name = names[min(int(len(names) * draw.random() ** 2), len(names) - 1)]  # some far more often than others
        (ids, want), n = draw.choice(known[name]), draw.randint(1, LONGEST)
        body = {"model": name, "prompt": ids, "max_tokens": n, "temperature": 0}
        kind = draw.random()
        if kind < UNKNOWN:
            response = await http.post("/v1/completions", json=body | {"model": "nobody"})
            said = {404: "unknown, 404", 429: "told to wait, 429"}
            tally.outcomes[said.get(response.status_code, "unknown, but answered")] += 1
        elif kind < UNKNOWN + GOES_AWAY:
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                async for _ in response.aiter_bytes():
                    break
            tally.outcomes["went away"] += 1
        else:
            await _compared(http, body, want[:n], tally, streamed=draw.random() < STREAMED)


async def _compared(http: httpx.AsyncClient, body: Json, want: list[int], tally: Tally, streamed: bool) -> None:
    """Ask until the queue has room, and compare."""
    while True:
        began = monotonic()
        try:
            response = await http.post("/v1/completions", json=body | {"stream": streamed})
        except httpx.TransportError as e:
            tally.outcomes[f"no answer: {type(e).__name__}"] += 1
            return
        if response.status_code != 429:
            break
        tally.outcomes["told to wait, 429"] += 1
        await asyncio.sleep(min(1.0, float(response.headers["retry-after"])))
    got = _tokens(response, streamed)
    if got == want:
        tally.outcomes["right"] += 1
        tally.tokens += len(got)
        tally.seconds.append(monotonic() - began)
        tally.used.add(body["model"])
    else:
        tally.outcomes["wrong"] += 1
        tally.wrong.append(f"{body['model']}: {response.status_code} {got}, not {want}")


def _tokens(response: httpx.Response, streamed: bool) -> list[int] | None:
    if response.status_code != 200:
        return None
    if not streamed:
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [t for line in lines for choice in json.loads(line).get("choices", []) for t in choice["token_ids"]]


async def changing(http: httpx.AsyncClient, known: Known, tally: Tally, draw: random.Random) -> None:
    """Register an adapter by another name, ask it, remove it, and ask again."""
    while tally.asked < tally.limit and monotonic() < tally.end:
        name = draw.choice(list(known))
        ids, want = known[name][0]
        added = await http.post("/v1/adapters/changing", json={"path": name})
        await _compared(
            http, {"model": "changing", "prompt": ids, "max_tokens": 4, "temperature": 0}, want[:4], tally, False
        )
        removed = await http.delete("/v1/adapters/changing")
        while True:  # a full queue says so before it looks for the adapter
            gone = await http.post("/v1/completions", json={"model": "changing", "prompt": ids})
            if gone.status_code != 429:
                break
        well = [r.status_code for r in (added, removed, gone)] == [200, 200, 404]
        tally.outcomes["added and removed" if well else "not added or removed"] += 1
        await asyncio.sleep(0.5)


async def sampling(pid: int, tally: Tally, began: float) -> None:
    """The server's resident memory, every few seconds."""
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tally.memory.append((round(monotonic() - began), round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)))
        await asyncio.sleep(5)


def processor(pid: int) -> float:
    """Seconds that the threads of a process took of any core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(address: str, pid: int, known: Known, tally: Tally, clients: int) -> str:
    """All clients until the requests, or the time, are over. Returns the server's own counts."""
    began, before = monotonic(), processor(pid)
    # A connection that was idle for as long as the server's 5 seconds may be closed under a request.
    limits = httpx.Limits(max_connections=clients + 2, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False) as http:
        sampler = asyncio.create_task(sampling(pid, tally, began))
        crowd = [client(http, known, tally, random.Random(i)) for i in range(clients)]
        try:
            await asyncio.gather(*crowd, changing(http, known, tally, random.Random(-1)))
        finally:
            sampler.cancel()
        tally.processor = processor(pid) - before
        return (await http.get("/metrics")).text


def report(tally: Tally, seconds: float, counts: str, adapters: int, resident: int, clients: int) -> Json:
    quarter = max(1, len(tally.memory) // 4)
    mib = [m for _, m in tally.memory]
    second, last = mib[quarter : 2 * quarter] or mib, mib[-quarter:]
    cuts = statistics.quantiles(tally.seconds, n=100) if len(tally.seconds) > 1 else [0.0] * 99
    return {
        "requested": tally.limit,
        "asked": tally.asked,
        "seconds": round(seconds),
        "adapters": adapters,
        "adapters_used": len(tally.used - {"changing"}),
        "resident": resident,
        "clients": clients,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "wrong": tally.wrong[:20],
        "requests_per_second": round(tally.outcomes["right"] / seconds, 1),
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "processor_milliseconds_per_answer": round(1000 * tally.processor / max(1, tally.outcomes["right"]), 1),
        "latency_seconds": {f"p{k}": round(cuts[k - 1], 3) for k in (50, 90, 99)},
        "memory_mib": {
            "first": mib[0],
            "median of the second quarter": statistics.median(second),
            "median of the last quarter": statistics.median(last),
            "largest": max(mib),
            "samples": tally.memory[:: max(1, len(tally.memory) // 60)],
        },
        "server": {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in counts.splitlines()
            if line.startswith("peftfn_") and "bucket" not in line and "_created" not in line
        },
    }


def said(record: Json) -> str:
    """What docs/serving.md says of a record."""
    r, o, m = record, record["outcomes"], record["memory_mib"]
    cores, load = record["environment"]["cpu_count"], record["environment"]["load_average"]
    return (
        f"Of {r['requested']:,} requests, {r['asked']:,} were asked in {r['seconds']} seconds, of "
        f"{r['adapters_used']:,} adapters, by {r['clients']} clients. **{o['right']:,} answers were right and "
        f"{o.get('wrong', 0)} wrong**; {o.get('told to wait, 429', 0):,} requests were told to wait, "
        f"{o.get('went away', 0):,} clients went away, and an adapter was added and removed "
        f"{o.get('added and removed', 0)} times. That is {r['requests_per_second']} answers a second with a median "
        f"latency of {r['latency_seconds']['p50']} seconds, and {r['processor_milliseconds_per_answer']} milliseconds "
        f"of the server's processor time for an answer of {r['tokens_per_second'] / r['requests_per_second']:.1f} "
        f"tokens, on {cores} cores with a load average of {load}: no figure to compare servers by. The server's memory "
        f"was {m['median of the second quarter']:.0f} MiB in the second quarter and "
        f"{m['median of the last quarter']:.0f} MiB in the last."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="stop after, with what was reached")
    parser.add_argument("--adapters", type=int, default=1000, metavar="N")
    parser.add_argument("--resident", type=int, default=64, metavar="N")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    o = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        known = made(Path(folder), o.adapters)
        print(f"{o.adapters} adapters written, {PROMPTS * o.adapters} answers known", flush=True)
        with serving(Path(folder), o.resident) as (address, pid):
            began = monotonic()
            tally = Tally(o.requests, began + 60 * o.minutes)
            counts = asyncio.run(run(address, pid, known, tally, o.clients))
            found = report(tally, monotonic() - began, counts, o.adapters, o.resident, o.clients)
    where = {k: v for k, v in environment(Options()).items() if k != "malloc"}  # which is as the system has it
    record = {"name": "soak", "environment": where, **found}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in ("memory_mib", "server")}, indent=1))
    print(said(record))
    sys.exit(any(name.startswith(("wrong", "no answer", "unknown, but", "not ")) for name in tally.outcomes))


if __name__ == "__main__":
    main()
