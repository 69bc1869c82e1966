"""What the folders beside this file are: written by the package `adapters` 1.3.0 (with transformers 4.57.6, attention
"eager", since its prefixes are wrong in "sdpa"), with the outputs that its models had.

    python written.py      # where `adapters` is installed; the library's own tests only read
"""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

HERE = Path(__file__).parent
IDS = torch.randint(3, 16, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0
SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 16}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3, "initializer_range": 0.3}
GPT2: dict[str, Any] = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
T5: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, Any] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, initializer_range=0.3, bos_token_id=1, eos_token_id=2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0, initializer_factor=2.0)),
}
BN: dict[str, Any] = {"reduction_factor": 2}
PHM: dict[str, Any] = {"reduction_factor": 2, "phm_dim": 2, "phm_init_range": 0.3}
CONFIGS: dict[str, Any] = {
    "parallel": lambda a: a.ParBnConfig(**BN, mh_adapter=True),
    "compacter": lambda a: a.CompacterConfig(**PHM),
    "adapterplus": lambda a: a.AdapterPlusConfig(**BN, stochastic_depth=0.0),
    "houlsby": lambda a: a.DoubleSeqBnConfig(**BN),
    "prefix": lambda a: a.PrefixTuningConfig(prefix_length=3, bottleneck_size=3),
    "flat": lambda a: a.PrefixTuningConfig(prefix_length=3, flat=True),
    "mam": lambda a: a.MAMConfig(a.PrefixTuningConfig(prefix_length=2, flat=True), a.ParBnConfig(**BN)),
}
CASES = ["bert-parallel", "bert-compacter", "bert-adapterplus", "bert-prefix", "roberta-flat", "gpt2-parallel"]
CASES += [
    "gpt2-compacter",
    "gpt2-adapterplus",
    "llama-mam",
    "gpt2-prefix",
    "t5-houlsby",
    "t5-parallel",
    "t5-adapterplus",
]
HEADS: dict[str, dict[str, Any]] = {
    "bert-head": {"num_labels": 3},
    "bert-pooled": {"num_labels": 3, "layers": 1, "use_pooler": True},
    "roberta-head": {"num_labels": 3},
}
"""Flexible heads, of models of the package's own classes."""


def inputs(name: str) -> dict[str, Any]:
    more: dict[str, Any] = {
        "t5": {"decoder_input_ids": IDS},
        "gpt2": {"use_cache": False},
        "llama": {"use_cache": False},
    }
    return {"input_ids": IDS, "attention_mask": MASK, **more.get(name, {})}


def main() -> None:
    import adapters
    from safetensors.torch import save_file

    wanted = {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        state = {k: t.clone() for k, t in make().state_dict().items()}
        save_file(state, HERE / f"{name}.safetensors")
        for case in (c for c in (*CASES, *HEADS) if c.startswith(f"{name}-")):
            model: Any = make()
            model.load_state_dict(state)
            model.set_attn_implementation("eager")
            adapters.init(model)
            config = CONFIGS.get(case.partition("-")[2], lambda a: a.SeqBnConfig(**BN))(adapters)
            if case in HEADS:
                cls: Any = adapters.BertAdapterModel if name == "bert" else adapters.RobertaAdapterModel
                own, model = model, cls(model.config)
                model.base_model.load_state_dict(own.base_model.state_dict(), strict=False)
                model.add_classification_head("task", **HEADS[case])
            torch.manual_seed(2)
            model.add_adapter("task", config=config)
            model.train_adapter("task")
            for name_, p in model.named_parameters():
                p.data += 0.3 * torch.randn_like(p) if ".task." in name_ else 0
            with torch.no_grad():
                wanted[case] = model.eval()(**inputs(name))[0].contiguous()
            safe = case.partition("-")[2] not in ("prefix", "flat", "mam")  # the package cannot write these so
            model.save_adapter(str(HERE / case), "task", with_head=case in HEADS, use_safetensors=safe)
    save_file(wanted, HERE / "outputs.safetensors")


if __name__ == "__main__":
    main()
