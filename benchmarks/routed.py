"""Mixed batches through experts, against a loop over adapters, the base, and PEFT where it runs them; what following
the rows through a whole model costs, and what following one function does."""

import copy
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import peftfn as pf
from benchmarks.harness import BASE, OURS, REPEATS, Json, Options, Target, row
from benchmarks.llama import PEFT, quiet
from benchmarks.models import PROJECTIONS, agree, leaves, llama

LOOP = "a loop over adapters"
EXPERTS = "experts alone"
NOTHING = "nothing followed"
INDEX = [2, -1, 0, 2, 1, 3, -1, 0]
PAGE = Path(__file__).parents[1] / "docs" / "many.md"


def mixtral(layers: int, d: int) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": d, "intermediate_size": 2 * d, "num_attention_heads": 4, "num_key_value_heads": 2}
    c = MixtralConfig(**size, vocab_size=1000, num_hidden_layers=layers, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(c).requires_grad_(False).eval()


class Adapted:
    """Rank 8 at all experts, the router and q, v; four adapters, and the base for two of eight rows."""

    def __init__(self, model: Any, routed: list[str] | None = None):
        self.model = model
        rules = {"experts": pf.LoRA(8), "gate": pf.LoRA(8), "q_proj|v_proj": pf.LoRA(8)}
        self.net = pf.adapt(model, rules, routed=routed)
        self.adapters = [self.net.init(seed) for seed in range(4)]
        for t in (t for a in self.adapters for t in leaves(a)):
            t += 0.02 * torch.randn_like(t)
        self.many = pf.stack(self.adapters)

    def mixed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.net.mixed(self.many, INDEX, ids, use_cache=False).logits
        return out

    def loop(self, ids: Tensor) -> Tensor:
        index, out = torch.tensor(INDEX), None
        for k in range(-1, len(self.adapters)):
            rows = (index == k).nonzero()[:, 0]
            x = ids[rows]
            base = self.model if k < 0 else partial(self.net.apply, self.adapters[k])
            y = base(x, use_cache=False).logits
            out = y.new_empty(len(ids), *y.shape[1:]) if out is None else out
            out[rows] = y
        assert out is not None
        return out


def batches(options: Options, layers: int, d: int) -> list[Json]:
    rows, model = [], mixtral(layers, d)
    for way in ("eager", "grouped_mm"):
        model.set_experts_implementation(way)
        adapted = Adapted(model)
        for tokens in (1, 32, 128):
            ids = torch.randint(0, 1000, (len(INDEX), tokens))
            ways: dict[str, Callable[[], Any]] = {
                OURS: quiet(adapted.mixed, ids),
                LOOP: quiet(adapted.loop, ids),
                BASE: quiet(lambda ids: model(ids, use_cache=False).logits, ids),
            }
            mine, theirs, plain = (f() for f in ways.values())
            agree(mine, theirs, f"mixed through experts, {way}")
            assert (mine - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapters do nothing: this is no check"
            target = Target(BASE, 1.6) if tokens == 32 else None
            reason = (
                "The loop over experts is the model's, in Python: each of its eleven functions an expert is followed. "
                "grouped_mm, which transformers uses unless it is told otherwise, has one product for all experts."
            )
            what = (
                f"{layers}-layer Mixtral, d {d}, 8 experts, 4 adapters and the base, LoRA r8, {way}, 8×{tokens} tokens"
            )
            rows.append(row(what, options.compare(ways), target=target, reason=reason))
    return rows


class Functions(nn.Module):
    """Two hundred of one function, and a linear layer."""

    def __init__(self, f: Callable[[Tensor], Any]):
        super().__init__()
        self.f, self.layer = f, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(200):
            self.f(x)
        return self.layer(x)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "x + x": lambda x: x + x,
    "x.reshape": lambda x: x.reshape(-1, 8),
    "x[0]": lambda x: x[0],
    "x.shape": lambda x: x.shape,
}


def functions(options: Options) -> list[Json]:
    """The same forward inside a routed module and outside of one."""
    rows = []
    for name, f in FUNCTIONS.items():
        model, x = Functions(f).eval(), torch.randn(4, 6, 8)
        nets = [pf.adapt(model, {"layer": pf.LoRA(2)}, routed=routed) for routed in ([""], None)]
        many = pf.stack([nets[0].init(seed) for seed in range(2)])
        ways = {who: quiet(net.mixed, many, [1, -1, 0, 1], x) for who, net in zip((OURS, "outside"), nets, strict=True)}
        agree(*(way() for way in ways.values()), "followed")
        rows.append(row(f"200 × {name} on [4, 6, 8] and a linear layer, inside a routed module", options.compare(ways)))
    return rows


def peft_of(model: Any, **targets: Any) -> PeftModel:
    """PEFT's form of four adapters of rank 8."""
    config = partial(LoraConfig, r=8, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, **targets)
    made = get_peft_model(copy.deepcopy(model), config(), adapter_name="0")
    for k in range(1, 4):
        made.add_adapter(str(k), config())
    assert isinstance(made, PeftModel)
    return made.eval()


NAMES = [str(k) if k >= 0 else "__base__" for k in INDEX]


def refused(model: Any, ids: Tensor) -> str:
    """What PEFT says of a mixed batch through experts."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    try:
        peft_of(model, target_modules=["q_proj", "v_proj"], target_parameters=experts)(ids, adapter_names=NAMES)
    except ValueError as e:
        return f"PEFT has no figure for a mixed batch through experts: it raises `ValueError: {e}`"
    raise AssertionError("PEFT runs a mixed batch through experts: measure it")


def attention(options: Options, layers: int, d: int) -> list[Json]:
    """What PEFT runs of the same: the attention of that model alone, its experts left out."""
    model, ids = mixtral(layers, d), torch.randint(0, 1000, (len(INDEX), 32))
    theirs, net = peft_of(model, target_modules=["q_proj", "v_proj"]), pf.adapt(model, {"q_proj|v_proj": pf.LoRA(8)})
    held = dict(theirs.named_parameters())
    adapters: list[pf.Adapter] = []
    for k in range(4):
        where = {n: f"base_model.model.{n.removesuffix('weight')}lora_{{}}.{k}.weight" for n in net.plan}
        adapters.append({n: {x: held[p.format(x.upper())].detach().clone() for x in "ab"} for n, p in where.items()})
    many = pf.stack(adapters)
    ways: dict[str, Callable[[], Any]] = {
        OURS: quiet(lambda ids: net.mixed(many, INDEX, ids, use_cache=False).logits, ids),
        PEFT: quiet(lambda ids: theirs(ids, adapter_names=NAMES, use_cache=False).logits, ids),
        BASE: quiet(lambda ids: model(ids, use_cache=False).logits, ids),
    }
    agree(ways[OURS](), ways[PEFT](), "mixed as PEFT")
    what = f"{layers}-layer Mixtral, d {d}, its q_proj and v_proj alone, 8×32 tokens"
    return [row(what, options.compare(ways), note=refused(model, ids[:, :4]))]


def scopes(options: Options, layers: int, d: int) -> list[Json]:
    """Rows followed through the whole model, against no more than is needed."""
    rows = []
    model: Any = llama(layers, d, 4 * d, 4).eval()
    ids = torch.randint(0, 1000, (8, 16))
    nets = [pf.adapt(model, {p: pf.LoRA(8) for p in PROJECTIONS}, routed=routed) for routed in ([""], [])]
    many = pf.stack([nets[0].init(seed) for seed in range(4)])
    for t in leaves(many):  # so that the two agree on adapters that do something
        t += 0.02 * torch.randn_like(t)

    def call(net: pf.Adapted) -> Tensor:
        out: Tensor = net.mixed(many, INDEX, ids, use_cache=False).logits
        return out

    ways = {who: quiet(call, net) for who, net in zip((OURS, NOTHING), nets, strict=True)}
    agree(ways[OURS](), ways[NOTHING](), "followed")
    rows.append(row(f"{layers}-layer Llama, d {d}, 8×16 tokens, the whole model followed", options.compare(ways)))
    moe = mixtral(layers, d)
    ids = torch.randint(0, 1000, (8, 32))
    both = [Adapted(moe, routed) for routed in ([""], None)]
    both[0].many = both[1].many
    ways = {who: quiet(adapted.mixed, ids) for who, adapted in zip((OURS, EXPERTS), both, strict=True)}
    agree(ways[OURS](), ways[EXPERTS](), "followed")
    rows.append(row(f"{layers}-layer Mixtral, d {d}, 8×32 tokens, the whole model followed", options.compare(ways)))
    return rows


def run(options: Options) -> list[Json]:
    torch.manual_seed(5)
    layers, d = (2, 64) if options.repeats < REPEATS else (4, 256)
    return [f for part in (batches, attention, scopes) for f in part(options, layers, d)] + functions(options)


# The page.


def page(record: Json) -> str:
    """What docs/many.md says of it."""

    def of(case: str, way: str) -> str:
        (found,) = (line for line in record["rows"] if all(word in line["case"] for word in case.split(";")))
        ratio = found["ratio_to"][way]
        return f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"

    e = record["environment"]
    clock = "" if e["clock"] == "wall" else ", CPU time"
    text = (
        "Measured by `python -m benchmarks routed` (four layers, d 256, rank 8, four adapters and the base in eight "
        f"rows; {e['date']}, torch {e['torch']}, {e['threads']} thread{clock}, load average {e['load_average']} at the "
        "end). A small Mixtral with all experts adapted takes, at 8×32 tokens, "
        f"{of('grouped_mm;8×32', BASE)} of the base's time with `grouped_mm`, which transformers uses unless told "
        f"otherwise, and {of('eager;8×32', BASE)} with `eager`; at 8×1, {of('grouped_mm;8×1 ', BASE)} and "
        f"{of('eager;8×1 ', BASE)}. Of a loop over the adapters, at 8×32, these are {of('grouped_mm;8×32', LOOP)} and "
        f"{of('eager;8×32', LOOP)}. With rows followed through the whole model, that Mixtral takes "
        f"{of('Mixtral;whole model', EXPERTS)} of what it does with its experts followed alone, and a Llama, where "
        f"nothing needs to be followed, {of('Llama;whole model', NOTHING)}. [Benchmarks](benchmarks.md) has them all."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def write_page(record: Json, path: Path = PAGE) -> None:
    """Put the figures between the page's marks."""
    head, mark, rest = path.read_text().partition("<!-- routed -->")
    _, end, tail = rest.partition("<!-- /routed -->")
    path.write_text(f"{head}{mark}\n\n{page(record)}\n\n{end}{tail}")


def main() -> None:
    from benchmarks import table

    write_page(next(r for r in table.read() if r["name"] == "routed"))


if __name__ == "__main__":
    main()
