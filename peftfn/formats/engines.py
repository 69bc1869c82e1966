"""What vLLM and SGLang accept of an adapter's files, as rules, with the release that each was read from.

A rule names the key of `adapter_config.json` or the tensors that it looks at, what is not accepted there, whether the
engine says so or serves the adapter without it, and the cure. What only the served model tells (which layers it has,
how its experts are stored, how large its vocabulary is) has no rule here.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from peftfn.formats.peft_config import candidates, listed

Does = Literal["refuses", "does not apply"]
REFUSES: Does = "refuses"
LEAVES_OUT: Does = "does not apply"  # it serves other values, or ends in an error

CURES = {
    "peft": "`peftfn convert PATH OUT --to peft`",
    "lora": "`pf.to_lora`, or `peftfn convert PATH OUT --to peft --rank R`",
    "plain": "`pf.conform` to a net with one rank, one alpha and no rslora",
    "wider": "`pf.conform` to a net that adapts the others too",
    "rank": "a larger `--max-lora-rank` for the server",
    "merge": "`peftfn merge`, which makes a model of its own",
    "none": 'no file means the same: `net.apply(…, method="generate")`',
}
"""Name → what to do."""


@dataclass(frozen=True)
class Engine:
    """title: its name in text. rank: its `--max-lora-rank` by default, None where it takes that of its adapters.
    ranks: those that it can be started with, () for any."""

    title: str
    version: str
    rank: int | None = None
    ranks: tuple[int, ...] = ()


ENGINES = {
    "vllm": Engine("vLLM", "0.33.0", 16, (1, 8, 16, 32, 64, 128, 256, 320, 512)),
    "sglang": Engine("SGLang", "0.5.23"),
}


@dataclass(frozen=True)
class Seen:
    """What a rule looks at: the format, PEFT's configuration as it stands in the file, the tensors' shapes, and the
    largest rank that the server takes."""

    format: str
    config: Mapping[str, Any]
    meta: Mapping[str, Tensor]
    limit: int | None

    @property
    def ranks(self) -> list[int]:
        """r and what overrides it."""
        given = (self.config.get("r"), *(self.config.get("rank_pattern") or {}).values())
        return [r for r in given if isinstance(r, int)]


@dataclass(frozen=True)
class Rule:
    """at: the key or the tensors. what: those of its values that are meant. does: engine → what it does with them.
    found: what of them an adapter has. alone: where it applies, the other rules say nothing more."""

    at: str
    what: str
    does: Mapping[str, Does]
    cure: str
    found: Callable[[Seen], Collection[str]]
    alone: bool = False


def key(name: str, also: Callable[[Any], bool] = bool) -> Callable[[Seen], list[str]]:
    """The value of a key that says something, and of which `also` is true."""

    def found(seen: Seen) -> list[str]:
        value = seen.config.get(name)
        return [str(value)[:80]] if value and also(value) else []

    return found


FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # the base's own, which both pass over
CLASSIFIERS = ("score", "classifier")
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # they change no weight of the base
KNOWN = frozenset((
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "in_proj", "in_proj_qkvz", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "embed_tokens", "lm_head",
    "unembed_tokens",
))  # fmt: skip
"""Last names of layers that SGLang has room for; some of them in some models alone."""


def other_format(seen: Seen) -> list[str]:
    return [] if seen.format == "peft" else [seen.format]


def of_weights(seen: Seen) -> list[str]:
    """Another type whose changes of weights have a nearest LoRA."""
    kind = seen.config.get("peft_type")
    return [str(kind)] if kind != "LORA" and any(c.mergeable for c in candidates(str(kind))) else []


def of_norms(seen: Seen) -> list[str]:
    kind = seen.config.get("peft_type")
    return [str(kind)] if kind == "LN_TUNING" else []


def of_inputs(seen: Seen) -> list[str]:
    kind = seen.config.get("peft_type")
    return [] if kind == "LORA" or of_weights(seen) or of_norms(seen) else [str(kind)]


def lacking(seen: Seen) -> list[str]:
    return [k for k in ("r", "lora_alpha", "target_modules") if k not in seen.config]


def above(seen: Seen) -> list[str]:
    """The rank that the server is not started for, but may be."""
    r, most = max(seen.ranks, default=0), ENGINES["vllm"].ranks[-1]
    return [f"{r}, and the server takes {seen.limit}"] if seen.limit is not None and seen.limit < r <= most else []


def far_above(seen: Seen) -> list[str]:
    r, most = max(seen.ranks, default=0), ENGINES["vllm"].ranks[-1]
    return [str(r)] if r > most else []


def above_given(seen: Seen) -> list[str]:
    r = seen.config.get("r")
    above = seen.limit is not None and isinstance(r, int) and r > seen.limit
    return [f"{r}, and the server takes {seen.limit}"] if above else []


def changes_base(seen: Seen) -> list[str]:
    start = seen.config.get("init_lora_weights")
    return [start] if isinstance(start, str) and start.lower() not in STARTS else []


def saved_whole(seen: Seen) -> list[str]:
    return [n for n in listed(seen.config.get("modules_to_save")) if n not in CLASSIFIERS]


def no_factor(seen: Seen) -> list[str]:
    """Tensors that are neither a LoRA's factors nor under the rule of a key."""
    return [k for k in seen.meta if not k.endswith((*FACTORS, *MAGNITUDE, *COPIES))]


def no_factor_of_vllm(seen: Seen) -> list[str]:
    """The same, without a classifier's own, and without those that vLLM refuses by a key."""
    whole = saved_whole(seen)
    ends = tuple(f"{n}.{k}" for n in CLASSIFIERS for k in ("weight", "bias"))
    biases = seen.config.get("lora_bias") or seen.config.get("bias", "none") != "none"

    def under_a_key(k: str) -> bool:
        return k.endswith(ends) or (biases and k.endswith(".bias")) or any(f".{n}." in f".{k}." for n in whole)

    return [k for k in no_factor(seen) if not under_a_key(k)]


def a_factors(seen: Seen) -> dict[str, Tensor]:
    """Layer → its A."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    return {k.removesuffix(e): t for k, t in seen.meta.items() for e in ends if k.endswith(e)}


def convolutions(seen: Seen) -> list[str]:
    return [n for n, a in a_factors(seen).items() if a.dim() > 2 and ".experts" not in n]


def other_ranks(seen: Seen) -> list[str]:
    layers = {n: a for n, a in a_factors(seen).items() if n not in stacked(seen) and a.dim() == 2}
    return [f"{n} has {len(a)}" for n, a in layers.items() if len(a) != seen.config.get("r")]


def stacked(seen: Seen) -> list[str]:
    """Experts in one parameter, by PEFT's names."""
    return [n for n in a_factors(seen) if n.endswith((".experts", ".experts.base_layer"))]


def half_of_experts(seen: Seen) -> list[str]:
    """Stacked experts one of whose two parameters alone is adapted."""
    found = stacked(seen)
    return [n for n in found if not n.endswith(".base_layer") and f"{n}.base_layer" not in found]


def without(one: str, other: str) -> Callable[[Seen], list[str]]:
    """Layers of the name `one` beside which none of the name `other` is adapted."""

    def found(seen: Seen) -> list[str]:
        layers = a_factors(seen)
        names = [n for n in layers if n.rpartition(".")[2] == one]
        return [n for n in names if f"{n.removesuffix(one)}{other}" not in layers]

    return found


def outside_layers(seen: Seen) -> list[str]:
    ours = [n for n in a_factors(seen) if not any(k in n for k in ("embed_tokens", "lm_head"))]
    return [n for n in ours if not re.search(r"layers\.\d+\.", n)]


def other_names(seen: Seen) -> list[str]:
    names = [n for n in a_factors(seen) if n not in stacked(seen) and n not in outside_layers(seen)]
    return [n for n in names if n.rpartition(".")[2] not in KNOWN]


def a_pattern(targets: Any) -> bool:
    return isinstance(targets, str) and targets not in ("all", "all-linear")


BOTH, SILENT = {"vllm": REFUSES, "sglang": REFUSES}, {"vllm": REFUSES, "sglang": LEAVES_OUT}
VLLM, SGLANG, SGLANG_SILENT = {"vllm": REFUSES}, {"sglang": REFUSES}, {"sglang": LEAVES_OUT}
RULES = (
    Rule("the files", "another format than PEFT's", BOTH, "peft", other_format, alone=True),
    Rule("`peft_type`", "another method for weights than LORA", BOTH, "lora", of_weights, alone=True),
    Rule("`peft_type`", "LN_TUNING", BOTH, "merge", of_norms, alone=True),
    Rule("`peft_type`", "prompts, prefixes, routers, new layers", BOTH, "none", of_inputs, alone=True),
    Rule("`r`, `lora_alpha`, `target_modules`", "one of them is missing", BOTH, "peft", lacking, alone=True),
    Rule("`r`, `rank_pattern`", "a rank above `--max-lora-rank`, 16 if not given", VLLM, "rank", above),
    Rule("`r`, `rank_pattern`", "a rank above 512", VLLM, "lora", far_above),
    Rule("`r`", "above `--max-lora-rank`, if that is given", SGLANG, "rank", above_given),
    Rule("the tensors", "another rank than `r`", SGLANG, "plain", other_ranks),
    Rule("`alpha_pattern`", "several alphas", SGLANG_SILENT, "plain", key("alpha_pattern")),
    Rule("`use_rslora`", "the scale alpha/√r", SGLANG_SILENT, "plain", key("use_rslora")),
    Rule("`use_dora`", "DoRA", BOTH, "lora", key("use_dora")),
    Rule("`init_lora_weights`", "starts that change the base: PiSSA, OLoRA, …", SILENT, "lora", changes_base),
    Rule("`use_bdlora`", "block-diagonal factors", SILENT, "lora", key("use_bdlora")),
    Rule("`use_qalora`", "QA-LoRA", SILENT, "lora", key("use_qalora")),
    Rule("`alora_invocation_tokens`", "activated LoRA", SILENT, "none", key("alora_invocation_tokens")),
    Rule("`layer_replication`", "repeated layers", SILENT, "none", key("layer_replication")),
    Rule("`target_modules`", "a regular expression", SGLANG, "peft", key("target_modules", a_pattern)),
    Rule("`modules_to_save`", "modules but for `score` and `classifier`", VLLM, "merge", saved_whole),
    Rule("`bias`", "trained biases", VLLM, "merge", key("bias", lambda v: v != "none")),
    Rule("`lora_bias`", "a bias of B", VLLM, "merge", key("lora_bias")),
    Rule("the tensors", "other tensors than LoRA's factors: trained tokens, KaSA's", VLLM, "merge", no_factor_of_vllm),
    Rule("the tensors", "other tensors than LoRA's factors: modules and biases too", SGLANG_SILENT, "merge", no_factor),
    Rule("the tensors", "a LoRA of a convolution", BOTH, "merge", convolutions),
    Rule("the tensors", "one of the two parameters of stacked experts alone", VLLM, "wider", half_of_experts),
    Rule("the tensors", "stacked experts", SGLANG, "merge", stacked),
    Rule("the tensors", "`q_proj` without `v_proj`", SGLANG, "wider", without("q_proj", "v_proj")),
    Rule("the tensors", "`k_proj` without `q_proj`", SGLANG, "wider", without("k_proj", "q_proj")),
    Rule("the tensors", "`v_proj` without `q_proj`", SGLANG, "wider", without("v_proj", "q_proj")),
    Rule("the tensors", "`up_proj` without `gate_proj`, in a model with both", SGLANG, "wider",
         without("up_proj", "gate_proj")),
    Rule("the tensors", "layers in no list `layers`, but for `embed_tokens` and `lm_head`", SGLANG_SILENT, "merge",
         outside_layers),
    Rule("the tensors", "layers of names that it does not know (`c_attn`), unless its class of the model adds them",
         SGLANG, "merge", other_names),
)  # fmt: skip
