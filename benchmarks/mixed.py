"""Mixed batches: every row with its own adapter, against PEFT's `adapter_names` and the bare base."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf
from benchmarks.harness import BASE, OURS, REPEATS, Json, Options, Target, row
from benchmarks.llama import PEFT, Linears, logits_of, quiet
from benchmarks.models import ALPHA, HAND, PROJECTIONS, RANK, RULE, agree, by_hand, inject, llama, method

STAY = "the same adapter twice"
BY_HAND = "The same products written out for this batch, in the model's layers, take what the column says."
RANKS = {"ranks 16": [16], "ranks 64, 32, 16, 8": [64, 32, 16, 8]}


def skewed(rows: int, k: int) -> list[int]:
    """Half of the rows use the first adapter, the others take turns."""
    return [0 if i < rows // 2 or k == 1 else 1 + i % (k - 1) for i in range(rows)]


SPREADS: dict[str, Callable[[int], list[int]]] = {
    "distinct": lambda k: list(range(k)),
    "uniform": lambda k: [i % k for i in range(2 * k)],
    "skewed": lambda k: skewed(2 * k, k),
    "identical": lambda k: [0] * (2 * k),
}
"""how adapters spread over rows: number of adapters → the adapter of each row"""


class Tenants:
    """One base with n LoRA adapters, in PEFT's form and in a bank."""

    def __init__(self, base: nn.Module, n: int, ranks: Sequence[int]):
        self.base = copy.deepcopy(base).eval()
        ours = copy.deepcopy(base).eval()
        nets = {r: pf.adapt(ours, {RULE: pf.LoRA(rank=r, alpha=ALPHA)}) for r in ranks}
        self.names = [f"tenant {i}" for i in range(n)]
        self.given = {
            name: (nets[ranks[i % len(ranks)]], self._adapter(nets, ranks, i)) for i, name in enumerate(self.names)
        }
        self.bank = pf.bank(self.given)
        self.peft = inject(copy.deepcopy(base).eval(), adapter_name=self.names[0], rank=ranks[0])
        for i, name in enumerate(self.names):
            if i:
                self.add_to_peft(name, ranks[i % len(ranks)])
            self._fill(name)
        self.peft.eval()

    @staticmethod
    def _adapter(nets: dict[int, pf.Adapted], ranks: Sequence[int], i: int) -> pf.Adapter:
        g = torch.Generator().manual_seed(i)
        fresh = nets[ranks[i % len(ranks)]].init(i)
        return {
            n: {k: t + 0.02 * torch.randn(t.shape, generator=g) for k, t in leaf.items()} for n, leaf in fresh.items()
        }

    def add_to_peft(self, name: str, rank: int) -> None:
        targets = PROJECTIONS if hasattr(self.base, "lm_head") else rf"({RULE})\.\d+"
        self.peft.add_adapter(name, LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))

    def _fill(self, name: str) -> None:
        net, adapter = self.given[name]
        for site in net.plan:
            layer: Any = self.peft.base_model.model.get_submodule(site.removesuffix(".weight"))
            layer.lora_A[name].weight.data.copy_(adapter[site]["a"])
            layer.lora_B[name].weight.data.copy_(adapter[site]["b"])

    def by_hand(self, index: Sequence[int]) -> nn.Module:
        """`by_hand` for the rows of a batch."""
        rows: dict[int, list[int]] = {}
        for i, k in enumerate(index):
            rows.setdefault(k, []).append(i)
        return by_hand(self.base, [(*self.given[self.names[k]], mine) for k, mine in rows.items()])

    def ways(self, index: Sequence[int], x: Tensor, **options: Any) -> dict[str, Callable[[], Any]]:
        names = [self.names[k] for k in index]
        ways = {
            OURS: quiet(self.bank.apply, names, x, **options),
            PEFT: quiet(self.peft, x, adapter_names=names, **options),
            BASE: quiet(self.base, x, **options),
            HAND: quiet(self.by_hand(index), x, **options),
        }
        mine, theirs, plain, hand = (logits_of(way()) for way in ways.values())
        agree(mine, theirs, "mixed batch")
        agree(mine, hand, "mixed batch by hand")
        assert (mine - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapters do nothing: this would be no check"
        return ways


def linear(options: Options) -> list[Json]:
    """One linear layer: every spread, number of adapters and number of tokens."""
    rows, small = [], options.repeats < REPEATS
    for ranks, sizes in RANKS.items():
        for k in (4,) if small else (1, 4, 8, 32, 64):
            tenants = Tenants(Linears(1, 512).requires_grad_(False), k, sizes)
            for tokens in (1, 64):
                for spread, make in SPREADS.items():
                    index = make(k)
                    x = torch.randn(len(index), tokens, 512, generator=torch.Generator().manual_seed(k))
                    times = options.compare(tenants.ways(index, x))
                    asked = (k, tokens, spread, len(sizes)) == (8, 1, "distinct", 1)
                    target = Target(BASE, 2.2) if asked else None
                    what = f"one linear layer, d 512, {k} adapters, {spread}, {len(index)}×{tokens} tokens, {ranks}"
                    rows.append(row(what, times, target=target, reason=BY_HAND))
    return rows


def forms(options: Options) -> list[Json]:
    """Ways to add each row's low-rank product: what the dispatcher takes, batched products, and what it does not."""
    rows, d, r = [], 512, RANK
    for k, each, tokens in ((4, 2, 1), (8, 4, 1), (32, 1, 1), (4, 2, 64), (32, 1, 64)):
        n = k * each
        x, y = torch.randn(n, tokens, d), torch.randn(n, tokens, d)
        down, up = torch.randn(k, r, d), torch.randn(k, d, r)
        sizes = torch.full((k,), each * tokens)
        ends, index = sizes.cumsum(0).int(), torch.arange(k).repeat_interleave(each)
        own = F.one_hot(index, k).float()[:, None, :, None]

        def batched(x: Tensor = x, y: Tensor = y, down: Tensor = down, up: Tensor = up, k: int = k) -> Tensor:
            given = y.view(k, -1, d)
            return torch.baddbmm(given, torch.bmm(x.view(k, -1, d), down.mT), up.mT)

        def loop(x: Tensor = x, y: Tensor = y, down: Tensor = down, up: Tensor = up, k: int = k) -> Tensor:
            parts = zip(x.view(k, -1, d), y.view(k, -1, d), down, up, strict=True)
            return torch.stack([torch.addmm(b, torch.mm(a, p.mT), q.mT) for a, b, p, q in parts])

        def grouped(x: Tensor = x, y: Tensor = y, down: Tensor = down, up: Tensor = up, ends: Tensor = ends) -> Tensor:
            s = F.grouped_mm(x.view(-1, d), down.mT, offs=ends)
            return y.view(-1, d) + F.grouped_mm(s, up.mT, offs=ends)

        def all_slots(x: Tensor = x, y: Tensor = y, down: Tensor = down, up: Tensor = up, own: Tensor = own) -> Tensor:
            s = F.linear(x, down.flatten(0, 1)).unflatten(-1, (-1, r)) * own
            return torch.addmm(y.view(-1, d), s.view(len(x) * x.shape[1], -1), up.mT.flatten(0, 1))

        def copied(x: Tensor = x, y: Tensor = y, down: Tensor = down, up: Tensor = up, i: Tensor = index) -> Tensor:
            return torch.baddbmm(y, torch.bmm(x, down[i].mT), up[i].mT)

        ways = {
            OURS: quiet(batched),
            "a loop": quiet(loop),
            "grouped_mm": quiet(grouped),
            "all slots, masked": quiet(all_slots),
            "factors copied to rows": quiet(copied),
        }
        wanted = ways[OURS]().view(-1, d)
        for name, way in ways.items():
            agree(way().view(-1, d), wanted, name)
        rows.append(
            row(f"the low-rank products alone, d {d}, {k} adapters, {n}×{tokens} tokens", options.compare(ways))
        )
    return rows


def model(options: Options, d: int, mlp: int, n: int, of_base: float) -> list[Json]:
    """A whole model with 224 sites, a token a row, all adapters distinct; LoRA and DoRA."""
    tenants = Tenants(llama(32, d, mlp, 4), n, [RANK])
    x, where = torch.randint(0, 1000, (n, 1)), f"32-layer Llama, d {d}, 224 sites, {n}×1 tokens, all distinct"
    ways = tenants.ways(range(n), x, use_cache=False)
    times = options.compare(ways)
    rows = [row(f"LoRA r16, {where}", times, target=Target(BASE, of_base), reason=BY_HAND)]
    net = pf.adapt(tenants.bank.nets.nets[0].model, {RULE: method(True)})
    magnitudes = {n: net.init()[n]["m"] for n in net.plan}
    dora = {
        name: (net, {n: {**leaf, "m": magnitudes[n]} for n, leaf in adapter.items()})
        for name, (_, adapter) in tenants.given.items()
    }
    mine = quiet(pf.bank(dora, prepared=True).apply, tenants.names, x, use_cache=False)
    times = options.compare({OURS: mine, "LoRA": ways[OURS]})
    return [*rows, row(f"DoRA r16, prepared, {where}", times, target=Target("LoRA", 1.15))]


def corners(options: Options) -> list[Json]:
    """A whole model with ranks that differ and adapters that are not evenly spread."""
    tenants, few = Tenants(llama(32, 256, 704, 4), 8, [64, 32, 16, 8]), Options(9, options.threads, options.clock)
    rows = []
    for spread, tokens, at_most in (("skewed", 64, None), ("skewed", 1, 2.2), ("uniform", 1, 2.0)):
        index = SPREADS[spread](8)
        x = torch.randint(0, 1000, (len(index), tokens))
        what = (
            f"LoRA, ranks 64, 32, 16, 8, 32-layer Llama, d 256, 224 sites, 8 adapters, {spread}, {len(index)}×{tokens}"
        )
        target = None if at_most is None else Target(BASE, at_most)
        times = few.compare(tenants.ways(index, x, use_cache=False))
        rows.append(row(f"{what} tokens", times, target=target, reason=BY_HAND))
    return rows


def one_adapter(options: Options) -> list[Json]:
    """All rows of a batch name the same adapter of several."""
    tenants, rows = Tenants(llama(32, 256, 704, 4), 4, [RANK]), []
    net, adapter = tenants.given[tenants.names[0]]
    for tokens in (1, 32):
        x = torch.randint(0, 1000, (8, tokens))
        ways = {
            OURS: quiet(tenants.bank.apply, [tenants.names[0]] * 8, x, use_cache=False),
            "apply": quiet(net.apply, adapter, x, use_cache=False),
        }
        agree(*(logits_of(way()) for way in ways.values()), "one adapter")
        what = f"LoRA r16, 32-layer Llama, d 256, 224 sites, 8×{tokens} tokens, all rows of one adapter of 4"
        rows.append(row(what, options.compare(ways), target=Target("apply", 1.05)))
    return rows


def swapping(options: Options) -> list[Json]:
    """What the n-th adapter costs: to register and load it, and to use it in the place of another."""
    small = options.repeats < REPEATS
    base = llama(32, 256, 704, 4).eval()
    net = pf.adapt(base, {RULE: method(False)})
    adapters = [net.init(i) for i in range(2)]
    bank, last = pf.Bank([net], 16 if small else 256), 8 if small else 256
    count = iter(range(10**9))

    def load() -> None:
        name = f"tenant {next(count)}"
        bank.put(name, net, adapters[0])
        with bank.holding([name]):
            pass

    def fresh() -> PeftModel:
        return inject(copy.deepcopy(base))

    def add(peft: PeftModel) -> None:
        peft.add_adapter("next", LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS))

    rows = []
    few = Options(5, options.threads, options.clock)  # PEFT's side takes a second
    for n in (2, last):
        while len(bank.names) < n - 1:
            load()
        times = few.compare({OURS: lambda _: load(), "PEFT's 2nd": add}, fresh=fresh, warmup=1)
        rows.append(row(f"adapter number {n}, 224 sites: register and load", times, target=Target("PEFT's 2nd", 0.1)))
    net = pf.adapt(Linears(224, 64).requires_grad_(False), {RULE: method(False)})  # small calls, so that 1 ms shows
    x = torch.randn(1, 64)
    same, other = (quiet(net.apply, net.init(i), x) for i in range(2))

    def switch() -> None:
        same()
        other()

    def stay() -> None:
        same()
        same()

    times = options.compare({OURS: switch, STAY: stay})
    target = Target(STAY, 1 + 1e-3 / statistics.median(times[STAY]))
    what, note = "two calls with two adapters, 224 linear layers, d 64, one row", "The target is 1 ms for the swap."
    return [*rows, row(what, times, target=target, note=note)]


def run(options: Options) -> list[Json]:
    torch.manual_seed(4)
    rows = forms(options) + linear(options)
    if options.repeats < REPEATS:
        return rows + model(options, 64, 176, 4, 1.65) + swapping(options)
    rows += model(options, 256, 704, 32, 1.65) + model(options, 768, 2048, 24, 1.3)
    return rows + corners(options) + one_adapter(options) + swapping(options)
