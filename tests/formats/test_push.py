"""The hub, by a stand-in on loopback that huggingface_hub itself talks to: push, load, caches, and what is sent."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as tf
from hub_stand_in import Hub, served
from models import by_name, tokens
from support import random
from torch import nn

import peftfn as pf


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with served() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield hub


def llama() -> nn.Module:
    return by_name["llama"].build()


def options(hub: Hub, **more: Any) -> dict[str, Any]:
    return {"endpoint": hub.address, **more}


def test_what_is_pushed_is_what_loads(hub: Hub, tmp_path: Path) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(rank=2)})
    a = random(net)
    address = pf.push("some/one", net, a, endpoint=hub.address, token="hf_secret", extra={"task_type": "CAUSAL_LM"})
    assert address == f"{hub.address}/some/one/commit/{hub.commit('some/one')}"
    files = hub.repos["some/one"]
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {sent for method, _, sent in hub.asked if method == "POST"} <= {"Bearer hf_secret", None}
    again, b = pf.load("some/one", llama(), hub_options=options(hub, cache_dir=tmp_path / "mine"))
    assert torch.equal(again.apply(b, tokens(2)).logits, net.apply(a, tokens(2)).logits)
    # from its cache alone, and only from the one that was named
    asked = len(hub.asked)
    pf.load("some/one", llama(), hub_options={"cache_dir": tmp_path / "mine", "local_files_only": True})
    with pytest.raises(OSError, match=r"."):
        pf.load("some/one", llama(), hub_options={"cache_dir": tmp_path / "empty", "local_files_only": True})
    assert len(hub.asked) == asked


def test_a_repository_has_one_adapter_and_keeps_its_card(hub: Hub) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(rank=2)})
    pf.push("some/one", net, net.init(), endpoint=hub.address)
    hub.repos["some/one"] |= {"README.md": b"my own words", "notes.txt": b"mine"}
    pf.push("some/one", net, net.init(), endpoint=hub.address, format="native", message="Native")
    names = {"adapter.safetensors", "peftfn.json", "README.md", "notes.txt"}
    assert hub.repos["some/one"].keys() == names and hub.repos["some/one"]["README.md"] == b"my own words"
    pf.push("some/one", net, net.init(), endpoint=hub.address, subfolder="two")
    assert hub.repos["some/one"].keys() > names
    found = pf.load_all("some/one", llama(), hub_options=options(hub))
    assert list(found) == ["default", "two"]
    assert set(pf.inspect("some/one", hub_options=options(hub))) == {""}


def test_the_card_says_what_the_hub_searches_by(hub: Hub) -> None:
    model = llama()
    model.name_or_path = "some/base"
    net = pf.adapt(model, {"q_proj|v_proj": pf.LoRA(rank=2)})
    for format, library in (("peft", "peft"), ("native", "peftfn")):
        pf.push(f"some/{format}", net, net.init(), endpoint=hub.address, format=format)
        card = huggingface_hub.ModelCard(hub.repos[f"some/{format}"]["README.md"].decode())
        assert (card.data.base_model, card.data.library_name) == ("some/base", library)
        assert card.data.pipeline_tag == "text-generation"
        assert {"transformers", "base_model:adapter:some/base"} <= set(card.data.tags)
        assert "| `LoRA(rank=2)` | 4 | `q_proj`, `v_proj` |" in card.text


def test_a_base_of_this_machine_is_not_in_the_card(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    net = pf.adapt(tf.LlamaForCausalLM.from_pretrained(tmp_path / "base"), {"q_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path / "a", net, net.init(), format="peft")
    assert "base_model" not in huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md").data.to_dict()


def test_nothing_is_sent_of_what_cannot_be_saved(hub: Hub) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(rank=2), "v_proj": pf.IA3()})
    with pytest.raises(ValueError, match="one method in a folder"):
        pf.push("some/one", net, net.init(), endpoint=hub.address)
    for name in ("one", "a/b/c", "../x", Path("a/b")):
        with pytest.raises(ValueError, match="give 'owner/name'"):
            pf.push(name, net, net.init(), endpoint=hub.address)  # type: ignore[arg-type]
    assert not hub.asked
