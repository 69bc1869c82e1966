"""torchtune's adapters in PEFT's layout, by hand: its checkpointer writes `adapter_model.safetensors`, converted, and
an `adapter_config.json` of four or five keys, next to the base's own files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import by_name
from safetensors.torch import save_file
from torch import Tensor

import peftfn as pf

BASE = by_name["llama"].build().eval()
NAMES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.gate_proj": (24, 16)}


def written(folder: Path, **more: Any) -> dict[str, Tensor]:
    """What torchtune writes of a LoRA of rank 2 and alpha 6."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{i}.{name}.lora_{k}.weight": torch.randn(shape, generator=g)
        for i in range(2)
        for name, (out, in_) in NAMES.items()
        for k, shape in (("A", (2, in_)), ("B", (out, 2)))
    }
    config = {
        "r": 2,
        "lora_alpha": 6.0,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "peft_type": "LORA",
        **more,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")  # the base's, which it copies
    torch.save({}, folder / "adapter_model.pt")  # its own layout
    return tensors


@pytest.mark.parametrize("more", [{}, {"base_model_name_or_path": "owner/name"}], ids=["old", "new"])
def test_its_peft_files_load(more: dict[str, Any], tmp_path: Path) -> None:
    tensors = written(tmp_path, **more)
    net, a = pf.load(tmp_path, BASE)
    assert len(net.plan) == 6
    for site, delta in net.delta(a).items():
        key = f"base_model.model.{site.removesuffix('.weight')}"
        want = 3 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(delta, want)


def test_its_dora_has_no_word_of_it_in_the_configuration(tmp_path: Path) -> None:
    """The magnitudes are there, and an error names them. (Those of q and k stand in torchtune's own order of rows.)"""
    tensors = written(tmp_path, target_modules=["v_proj"])
    tensors = {k: t for k, t in tensors.items() if "v_proj" in k}
    for i in range(2):
        tensors[f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_magnitude_vector"] = torch.rand(8) + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors have no place .*lora_magnitude_vector"):
        pf.load(tmp_path, BASE)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    net, _ = pf.load(tmp_path, BASE)
    assert all(type(e.method) is pf.DoRA for e in net.plan.values())
