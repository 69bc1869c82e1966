"""PEFT's configurations as tables: defaults by type, patterns, and the keys that have no effect on outputs."""

from typing import Any

from peftfn.model.choice import HEADS

VERSION = "0.21.2"
"""The release of PEFT whose format, defaults and rules are written here."""
BONE = "BONE"
"""A type of older releases: MiSS, with another name in its keys."""
COUNTS = frozenset({"num_cayley_neumann_terms", "psoft_svd_lowrank_niter", "depth"})
"""Keys that say how often something is done: a large number would keep a load busy for hours."""
PATTERNS = {
    "rank_pattern": ("r", "effective_rank"),
    "alpha_pattern": ("lora_alpha", "alpha"),
    "lambda_pattern": ("delora_lambda",),
    "block_size_pattern": ("block_size",),
    "n_frequency_pattern": ("n_frequency",),
}
"""Pattern in the configuration → the keys it overrides for the modules it matches."""
LEGACY = frozenset({"FOURIERFT", "C3A"})
"""Types that match their pattern's keys by the older rule."""
SEARCHED = frozenset({"OSF"})
"""Types that look for a pattern's keys anywhere in a name."""
UNPATTERNED = frozenset({"HIRA", "ADALORA"})
"""Types whose rank_pattern PEFT 0.21.2 does not apply (HiRA), or gives another meaning (AdaLoRA)."""
_BIASED = "BOFT C3A DEFT DELORA FROD GLORA GRALORA HRA LORA OFT PVERA RANDLORA TINYLORA UNILORA VBLORA VERA WAVEFT"
BIAS = {kind: f"{kind.lower()}_only" for kind in _BIASED.split()} | {
    "ADALORA": "lora_only",
    "FOURIERFT": "fourier_only",
    "MISS": "MiSS_only",
}
"""Types that can train biases → what `bias` is where only the adapted layers' are trained."""
MANY = 20
"""A list of so many target_modules PEFT replaces by a shorter one that finds the same."""
_NAMES = (
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out save_projection "
    "target_parameters trainable_token_indices ensure_weight_tying runtime_config megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step "
    "target_r init_r rank_dropout_scale use_asa asa_target_subspaces init_warmup final_warmup mask_interval "
    "asa_importance_beta asa_uncertainty_beta asa_schedule_exponent progressbar runtime_offload_base_weight "
    "target_svd_config save_indices save_precomputed_indices save_only_topk_weights qalora_group_size "
    "mask_type"  # of SHiRA: the file has the places themselves
)
IGNORED = frozenset([*_NAMES.split(), *PATTERNS])
"""Keys without an effect on the outputs of a loaded adapter, or read elsewhere in this package."""
_RANDOM = frozenset({"kaiming_uniform", "xavier_uniform", "normal", "uniform"})
STARTS = _RANDOM | {"gaussian", "eva", "orthogonal", "lycoris"}
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
    "OSF": {"effective_rank": None, "init_weights": True},
    "PEANUT": {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0, "init_weights": True},
    "POLY": {"r": 8, "poly_type": "poly", "n_tasks": 1, "n_skills": 4, "n_splits": 1, "init_weights": True},
    "PSOFT": {"r": 32, "psoft_alpha": 32, "ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_svd_lowrank_niter":
        10, "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True, "use_cayley_neumann":
        False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None, "init_weights": True},
    "PVERA": {"r": 256, "projection_prng_key": 0, "d_initial": 0.1, "init_weights": True, "sample_at_inference":
        False, "generator_seed": None},
    "RANDLORA": {"r": 32, "projection_prng_key": 0, "sparse": False, "very_sparse": False, "randlora_alpha": 640,
        "init_weights": True},
    "ROAD": {"variant": "road_1", "group_size": 64, "init_weights": True},
    "SHIRA": {"r": 32, "random_seed": None, "init_weights": True},
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
MORE = {  # layers besides nn.Linear that PEFT 0.21.2 has a method for
    "LORA": "linear_t embedding conv1 conv2 conv3 attention stack stack_t parameter",
    "ADALORA": "linear_t conv2",
    "BOFT": "conv2",
    "DEFT": "linear_t",
    "FOURIERFT": "linear_t",
    "FROD": "linear_t",
    "GRALORA": "linear_t",
    "HIRA": "linear_t embedding conv1 conv2 conv3",
    "HRA": "conv2",
    "IA3": "linear_t conv2 conv3",
    "LOHA": "conv1 conv2",
    "LOKR": "conv1 conv2",
    "OFT": "embedding conv2",
    "PVERA": "linear_t",
    "RANDLORA": "linear_t",
    "TINYLORA": "linear_t embedding",
    "TRAINABLE_TOKENS": "embedding",
    "UNILORA": "linear_t",
    "VBLORA": "linear_t",
    "VERA": "linear_t",
    "WAVEFT": "linear_t",
}
WINDOWS = frozenset({"HIRA", "IA3", "LOHA", "LOKR"})
"""Types that keep a convolution's groups and dilation; of the others, PEFT's forward leaves them out, or fails."""
RENAMED = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Kinds of conversion in transformers → last names in target_modules that PEFT takes for parts of stacked experts."""
CLASSIFIERS = HEADS
"""task_type → the modules that PEFT saves whole along with any method, if the model has them."""
_BUT = "embedding conv1 conv2 conv3 attention stack stack_t parameter"
LESS = {  # and those of them that it has no such option for
    "use_dora": "attention stack stack_t parameter",
    "lora_bias": "embedding attention stack stack_t parameter",
    "use_bdlora": f"linear_t {_BUT}",
    "kasa_config": f"linear_t {_BUT}",
    "use_qalora": f"linear_t {_BUT}",
    "monteclora_config": _BUT,
    "velora_config": _BUT,
    "init_lora_weights": _BUT.removeprefix("embedding "),
}
