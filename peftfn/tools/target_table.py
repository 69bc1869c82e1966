"""Which layers PEFT adapts in a model of a known architecture by default: the tables behind `targets`.

Names are separated by spaces, each as `target_modules` has it; * marks layers whose inputs IA3 scales. They are those
of PEFT 0.21.2, with which the tests compare them. An architecture that a method's own table lacks is looked up in
`USUAL`.
"""

_QV, _FULL = "q_proj v_proj", "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
_LLAMAS = "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3"


def _table(modules_of: dict[str, str]) -> dict[str, str]:
    """{modules: "types"} → {type: modules}."""
    return {kind: modules for modules, kinds in modules_of.items() for kind in kinds.split()}


USUAL = _table(
    {
        _QV: f"{_LLAMAS} bart opt gptj gpt_neo stablelm",
        "q v": "t5 mt5",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "c_attn": "gpt2 gpt_bigcode",
        "q v q_proj v_proj": "blip-2",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "Wqkv": "mpt",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "q_proj v_proj fc1 fc2": "phi",
        r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }
)
"""Architecture (`model.config.model_type`) → modules, as for LoRA."""

_WIDE = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "query_proj key_proj value_proj dense": "deberta-v2",
}
_SPECTRAL = _table({"mlp.c_proj": "gpt2 gpt_bigcode"})
_PHI = _table({_QV: "phi"})
_VIT = _table({"query value": "vit"})

OF_METHOD: dict[str, dict[str, str]] = {
    "AdaLoRA": _table({**_WIDE, "query key value dense": "roberta"}),
    "AdaMSS": _VIT,
    "BEFT": _table(
        {
            "v": "t5 mt5",
            "value": "bert roberta",
            "value_proj": "deberta-v2",
            "v_proj": f"{_LLAMAS} opt gptj gpt_neo bart phi",
        }
    ),
    "C3A": _SPECTRAL,
    "FourierFT": _SPECTRAL,
    "FRoD": _PHI | _VIT,
    "IA3": _table(
        {
            "k v wo*": "t5",
            "k v wi_1": "mt5",
            "c_attn mlp.c_proj*": "gpt2 gpt_bigcode",
            "query_key_value mlp.dense_4h_to_h*": "bloom",
            "query_key_value dense_4h_to_h*": "gpt_neox RefinedWebModel RefinedWeb falcon",
            "key value output.dense*": "bert roberta",
            "key_proj value_proj output.dense*": "deberta-v2",
            "in_proj output.dense*": "deberta",
            "q_proj k_proj fc2*": "opt",
            "q_proj v_proj fc_out*": "gptj",
            "q_proj v_proj c_proj*": "gpt_neo",
            "q_proj v_proj fc2*": "bart phi",
            "k_proj v_proj down_proj*": "llama mistral",
            "k_proj v_proj w2*": "mixtral",
            "q_proj v_proj down_proj*": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        }
    ),
    "OSF": _table(
        {
            _FULL: f"{_LLAMAS} phi",
            "c_attn c_proj": "gpt2 gpt_bigcode",
            "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
            "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
            "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        }
    ),
    "PVeRA": _PHI | _table({"query value": "dinov2"}),
    "SHiRA": _PHI,
    "VBLoRA": _table(_WIDE),
    "VeRA": _PHI,
    "WaveFT": _SPECTRAL,
}
"""Method → architecture → modules, where they differ from the usual."""
