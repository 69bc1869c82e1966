"""What the readers and writers of PEFT's prompts, prefixes and LLaMA-Adapters share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfn.formats.tensor_files import Tensors as File
from peftfn.model.model import Model

PROMPT = "prompt_embeddings"
HEAD = "base_model."
"""In front of the names of what is saved whole."""
ALWAYS = (
    "auto_mapping base_model_name_or_path inference_mode modules_to_save num_attention_heads num_layers "
    "num_transformer_submodules num_virtual_tokens peft_type peft_version revision task_type token_dim "
    "tokenizer_kwargs tokenizer_name_or_path"
)
"""Keys of a configuration that have no effect here, or that are read wherever they are."""


def heads_in(file: File, model: Model, own: set[str]) -> tuple[dict[str, str], list[str]]:
    """({parameter: key} of what the file saves whole, keys that have no place in the model)."""
    heads, stray = {}, []
    for key in file.meta.keys() - own:
        name = key.removeprefix(HEAD)
        if key != name and name in model.named:
            heads[model.named[name].name] = key
        else:
            stray.append(key)
    return heads, sorted(stray)


def used(config: Mapping[str, Any], known: set[str], where: Path) -> None:
    """ValueError for a key of the configuration that nothing here reads."""
    for key, value in config.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise ValueError(
                f"{where}: {key} is {value!r}, which peftfn does not know for {config['peft_type']}: the outputs may "
                "differ. If it is known to make no difference, delete it from the file"
            )


def sizes(model: Model, site: str) -> dict[str, Any]:
    """PEFT's keys for the sizes of a backbone."""
    c: Any = getattr(model.modules[site], "config", None)
    names = {
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    }
    return {k: next((v for n in ns if (v := getattr(c, n, None)) is not None), None) for k, ns in names.items()}
