"""adapter_config.json: reading it as untrusted input, PEFT's defaults, and what the configuration is at one module."""

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftfn.method import Method, registry

VERSION = "0.21.2"
"""The release of PEFT whose format, defaults and rules are written here."""
LIMIT = 1 << 24
"""Bytes of a configuration file; the largest real ones (a pattern for every layer) are far smaller."""
PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"}
)
PATTERNS = {
    "rank_pattern": ("r",),
    "alpha_pattern": ("lora_alpha", "alpha"),
    "lambda_pattern": ("delora_lambda",),
    "block_size_pattern": ("block_size",),
    "n_frequency_pattern": ("n_frequency",),
}
"""Pattern in the configuration → the keys it overrides for the modules it matches."""
LEGACY = frozenset({"FOURIERFT", "C3A"})
"""Types that match their pattern's keys by the older rule."""
UNPATTERNED = frozenset({"HIRA", "ADALORA"})
"""Types whose rank_pattern PEFT 0.21.2 does not apply (HiRA), or gives another meaning (AdaLoRA)."""
_NAMES = (
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out save_projection "
    "target_parameters trainable_token_indices ensure_weight_tying runtime_config megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step "
    "target_r init_r rank_dropout_scale use_asa asa_target_subspaces init_warmup final_warmup mask_interval "
    "asa_importance_beta asa_uncertainty_beta asa_schedule_exponent progressbar runtime_offload_base_weight "
    "save_indices save_precomputed_indices qalora_group_size"
)
IGNORED = frozenset([*_NAMES.split(), *PATTERNS])
"""Keys without an effect on the outputs of a loaded adapter, or read elsewhere in this package."""
STARTS = frozenset({"gaussian", "eva", "orthogonal", "lycoris", "kaiming_uniform", "xavier_uniform", "normal"})
"""Initialisations that leave the base weight as it is (PiSSA, OLoRA, CorDA, LoftQ … subtract from it)."""
# fmt: off
DEFAULTS: dict[str, dict[str, Any]] = {
    "ADALORA": {"r": 8, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True, "use_dora": False,
        "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False, "monteclora_config": None,
        "layer_replication": None, "lora_bias": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None},
    "ADAMSS": {"r": 100, "num_subspaces": 5, "subspace_rank": 1, "init_weights": "orthogonal", "use_dynamic_rank":
        False, "svd_threshold": 0.1, "random_seed": 0},
    "BEFT": {"init_weights": True},
    "BOFT": {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "init_weights": True},
    "C3A": {"block_size": 256, "init_weights": "xavier_uniform"},
    "DEFT": {"r": 8, "decomposition_method": "relu", "init_scale": 1.0, "alpha": None, "para": False, "init_weights":
        True},
    "DELORA": {"r": 8, "delora_lambda": 15, "init_weights": True},
    "FOURIERFT": {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "init_weights": False},
    "FROD": {"projection_prng_key": 0, "init_weights": True, "sparse_rate": 0.01, "regularization_alpha": 0.001},
    "GLORA": {"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant", "init_weights": True},
    "GRALORA": {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2, "init_weights": True},
    "HIRA": {"r": 32, "init_weights": True},
    "HRA": {"r": 8, "apply_GS": False, "init_weights": True},
    "IA3": {"feedforward_modules": None, "init_ia3_weights": True},
    "LILY": {"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0, "init_weights": True},
    "LN_TUNING": {},
    "LOHA": {"r": 8, "alpha": 8, "use_effective_conv2d": False, "init_weights": True},
    "LOKR": {"r": 8, "alpha": 8, "use_effective_conv2d": False, "decompose_both": False, "decompose_factor": -1,
        "init_weights": True},
    "LORA": {"r": 8, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True, "use_dora": False,
        "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False, "monteclora_config": None,
        "layer_replication": None, "lora_bias": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None},
    "MISS": {"r": 64, "mini_r": 1, "init_weights": True},
    "OFT": {"r": 0, "oft_block_size": 32, "init_weights": True, "coft": False, "eps": 6e-05, "block_share": False,
        "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    "OSF": {"effective_rank": None, "init_weights": True, "target_svd_config": None},
    "PEANUT": {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0, "init_weights": True},
    "PSOFT": {"r": 32, "psoft_alpha": 32, "ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_svd_lowrank_niter":
        10, "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True, "use_cayley_neumann":
        False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None, "init_weights": True},
    "PVERA": {"r": 256, "projection_prng_key": 0, "d_initial": 0.1, "init_weights": True, "sample_at_inference":
        False, "generator_seed": None},
    "RANDLORA": {"r": 32, "projection_prng_key": 0, "sparse": False, "very_sparse": False, "randlora_alpha": 640,
        "init_weights": True},
    "ROAD": {"variant": "road_1", "group_size": 64, "init_weights": True},
    "SHIRA": {"r": 32, "mask_type": "random", "random_seed": None, "init_weights": True},
    "SUPERTUNING": {"sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "init_weights": True},
    "TINYLORA": {"r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42, "init_v_bound": 0.02, "init_weights":
        True},
    "TRAINABLE_TOKENS": {"token_indices": [], "init_weights": True},
    "UNILORA": {"r": 4, "proj_seed": 42, "theta_d_length": 256, "init_theta_d_bound": 0.02, "init_weights": True,
        "save_indices": False},
    "VBLORA": {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "save_only_topk_weights": False,
        "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
    "VERA": {"r": 256, "projection_prng_key": 0, "d_initial": 0.1, "init_weights": True},
    "WAVEFT": {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True, "random_loc_seed":
        777, "proportional_parameters": False, "init_weights": True},
}
# fmt: on
"""What a key that a file leaves out means, by type; keys without an effect are left out."""


class Config(dict[str, Any]):
    """A configuration that remembers which keys were asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def read(path: Path) -> dict[str, Any]:
    """The configuration with PEFT's defaults filled in. ValueError for anything that is none."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {LIMIT}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise ValueError(f"the key {twice!r} is there twice")
        return dict(pairs)

    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: no valid JSON: {e}") from e
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{path}: no PEFT configuration: it must be an object with a text under 'peft_type'")
    if kind in PROMPTS:
        raise ValueError(f"{path}: {kind} trains a prompt, not weights; this format does not read such files yet")
    defaults = DEFAULTS.get(kind, {})
    for key, want in defaults.items():
        have = config.get(key, want)
        fits = {bool: (bool,), int: (int, float), float: (int, float), str: (str,)}.get(type(want), (object,))
        if key.startswith("init_") and isinstance(want, bool | str) and isinstance(have, bool | str):
            continue  # such keys take either
        wrong = not isinstance(have, fits) or (isinstance(have, bool) and bool not in fits)
        if have is not None and wrong and object not in fits:
            raise ValueError(f"{path}: {key} is {have!r}, and PEFT's {kind} has a {type(want).__name__} there")
        if isinstance(have, float) and not math.isfinite(have):
            raise ValueError(f"{path}: {key} is {have}, which is not finite")
    for key in (*PATTERNS, "trainable_token_indices"):
        names = config.get(key)
        if names and not (isinstance(names, dict) or (key not in PATTERNS and isinstance(names, list))):
            raise ValueError(f"{path}: {key} is {str(names)[:80]}; it must be an object of name → value")
    for key in ("target_parameters", "modules_to_save"):
        if not all(isinstance(n, str) for n in listed(config.get(key))):
            raise ValueError(f"{path}: {key} is {str(config[key])[:80]}; it must be a list of names")
    return {**defaults, **config}


def listed(value: Any) -> list[Any]:
    """A configuration's list of names: a list, one name, or nothing."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def at(config: dict[str, Any], module: str, kind: str, where: Path) -> Config:
    """The configuration as it holds for one module: patterns resolved, `feedforward_modules` a truth value; with
    the `module`'s name and the `kind` of its site."""
    here, legacy = Config({**config, "module": module, "kind": kind}), config["peft_type"] in LEGACY
    for pattern, keys in PATTERNS.items():
        rules: dict[str, Any] = {} if config["peft_type"] in UNPATTERNED else config.get(pattern) or {}
        for key in keys:
            if key in config and rules:
                here[key] = next((v for k, v in rules.items() if matcher(k, where, legacy)(module)), config[key])
    masks = config.get("rank_pattern") if config["peft_type"] == "ADALORA" else None
    for key, mask in (masks or {}).items():  # AdaLoRA's: which of a layer's ranks are left
        if isinstance(mask, list) and f".{key}".endswith(f".{module}.lora_E"):
            here["init_r"] = sum(m is True for m in mask)
    if kind == "embedding" and isinstance(config.get("init_lora_weights"), str):
        here["init_lora_weights"] = True  # at embeddings PEFT knows no other start, and subtracts nothing
    if "feedforward_modules" in config:
        names = config["feedforward_modules"]
        if isinstance(names, str):
            here["feedforward_modules"] = bounded(names, where).fullmatch(module) is not None
        else:
            here["feedforward_modules"] = any(module.endswith(n) for n in listed(names))
    return here


def method(config: dict[str, Any], module: str, kind: str, where: Path) -> Method:
    """The method that the configuration describes at a module. ValueError for what no method of ours can mean."""
    here = at(config, module, kind, where)
    classes = candidates(config["peft_type"])
    fits = [c for c in classes if c.peft and all(_is(dict.get(here, k), v) for k, v in c.peft.fixed.items())]
    if not fits:
        raise ValueError(f"{where}: no method here is PEFT's {config['peft_type']} with these options")
    cls = max(fits, key=lambda c: len(c.peft.fixed) if c.peft else 0)
    try:
        found = cls.from_peft(here)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{where}: at {module}: {cls.__name__} cannot be what the file says: {e}") from e
    defaults = DEFAULTS.get(config["peft_type"], {})
    assert cls.peft is not None
    here.read |= {*cls.peft.fields.values(), *cls.peft.fixed}
    for key, value in ((k, v) for k, v in here.items() if k in config):
        if key in here.read or key in IGNORED or key.endswith("dropout") or value == defaults.get(key):
            continue
        if key.startswith("init_") and (isinstance(value, bool | float | int) or value in STARTS):
            continue
        if value is None or value is False or value in ("", 0, [], {}):
            continue
        cure = (
            "; save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            if key == "init_lora_weights"
            else ""
        )
        raise ValueError(
            f"{where}: {key} is {value!r}, which {cls.__name__} does not have: the outputs would differ{cure}"
        )
    return found


def _is(have: Any, want: Any) -> bool:
    """`...` stands for anything that is set."""
    return have not in (None, False) if want is ... else bool(have == want)


def candidates(kind: str) -> list[type[Method]]:
    """The registered methods that PEFT writes under this type."""
    return [c for c in registry.values() if declared(c) and c.peft is not None and c.peft.type == kind]


def declared(cls: type[Method]) -> bool:
    """Whether PEFT has this very method, and not only the one it is derived from."""
    return vars(cls).get("peft") is not None


def matcher(key: Any, where: Path, legacy: bool = False) -> Callable[[str], bool]:
    """Whether a module's name matches a key of a pattern, by PEFT's rule: the whole name, or its end after a dot.

    legacy: the older rule, an end after a dot or the name itself.
    """
    if not isinstance(key, str):
        raise ValueError(f"{where}: a pattern's key is {key!r}; it must be a name or a regular expression")
    if legacy:
        after = re.compile(rf"\.(?:{bounded(key, where).pattern})")
        return lambda m: m == key or any(after.fullmatch(m, i) for i, c in enumerate(m) if c == ".")
    if re.fullmatch(r"\^?[\w-]+", key):  # by far the most frequent, and quick
        name = key.removeprefix("^")
        return lambda m: m == name or (not key.startswith("^") and m.endswith(f".{name}"))
    pattern = bounded(key, where)
    return lambda m: any(pattern.fullmatch(m, i) for i in range(len(m)) if i == 0 or m[i - 1] == ".")


@lru_cache
def bounded(key: str, where: Path) -> re.Pattern[str]:
    """A regular expression from a file, if it is certain to end soon: at most two unbounded repetitions, none of a
    group, no references, no look-around."""
    loose = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", key))
    if len(key) > 400 or loose > 2 or re.search(r"\)[*+{]|\\\d|\(\?[^:]|[*+}][*+]", key) or key.count("?") > 4:
        raise ValueError(
            f"{where}: the pattern {key[:80]!r} could take very long to match; use names, or at most two of * and +"
        )
    try:
        return re.compile(key)
    except re.error as e:
        raise ValueError(f"{where}: {key[:80]!r} is no regular expression: {e}") from e
