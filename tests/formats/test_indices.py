"""Indices that a file has: those of PEFT's files, and duplicates. (The law `indices` is about every method's own.)"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peftfn as pf
from peftfn.core.indices import Index


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))


def changed(folder: Path, net: pf.Adapted, key: str, at: tuple[int, ...], value: int) -> Path:
    """PEFT's file of a fresh adapter, with one index changed; its path."""
    pf.save(folder, net, net.init(1), format="peft")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [k for k in tensors if k.endswith(key) and ".0." in k]
    tensors[name][at] = value
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        ((0, 3), 6, "has 6; it must be from 0 to 5"),
        ((1, 3), 8, "has 8; it must be from 0 to 7"),  # within the flattened weight, at another row
        ((1, 0), -1, "has -1; it must be from 0 to 7"),
        ((0, 0), 2**31 - 1, "has 2147483647; it must be from 0 to 5"),
    ],
)
def test_a_place_beyond_the_weight_is_an_error(at: tuple[int, ...], value: int, says: str, tmp_path: Path) -> None:
    net = pf.adapt(model(), {"weight": pf.SHiRA(rank=1)})
    file = changed(tmp_path, net, "shira_indices", at, value)
    with pytest.raises(ValueError, match=says) as e:
        pf.load(tmp_path, model())
    assert str(file) in str(e.value) and "0.weight: its constant 'index'" in str(e.value)


def test_a_place_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    net = pf.adapt(model(), {"weight": pf.SHiRA(rank=1)})
    row, column = net.plan["0.weight"].frozen["index"].tolist()
    changed(tmp_path, net, "shira_indices", (0, 1), row[0])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(k for k in tensors if "shira_indices" in k and ".0." in k)
    tensors[name][1, 1] = column[0]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="one place twice"):
        pf.load(tmp_path, model())


def test_unilora_and_supertuning_too(tmp_path: Path) -> None:
    uni = pf.adapt(model(), {"weight": pf.UniLoRA(rank=2, length=9)})
    changed(tmp_path / "uni", uni, "unilora_indices_A", (0, 0), 9)
    with pytest.raises(ValueError, match=r"0\.weight: its constant 'ia' has 9; it must be from 0 to 8"):
        pf.load(tmp_path / "uni", model())
    tuned = pf.adapt(model(), {"weight": pf.SuperTuning(sparsity=0.8)})
    changed(tmp_path / "super", tuned, "supertuning_indices", (0,), 48)
    with pytest.raises(ValueError, match=r"0\.weight: its constant 'at' has 48; it must be from 0 to 47"):
        pf.load(tmp_path / "super", model())


@pytest.mark.parametrize("value", [-1, 6, 200])
def test_vbloras_vectors_are_of_the_bank_and_different(value: int, tmp_path: Path) -> None:
    net = pf.adapt(model(), {"0.weight": pf.VBLoRA(rank=2, vectors=6, length=2, topk=2)})
    pf.save(tmp_path, net, net.init(), format="peft", compact=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("logits_A_topk_indices"))
    for wrong in (value, int(tensors[key][0, 0, 1])):  # the second is there already
        broken = {**tensors, key: tensors[key].long()}
        broken[key][0, 0, 0] = wrong
        save_file(broken, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="topk_indices") as e:
            pf.load(tmp_path, model())
        assert "the bank has 6 vectors" in str(e.value)


@pytest.mark.parametrize("tokens", [[-1], [9], [3, 3], [10**12], [1.0], [True]])
def test_tokens_are_of_the_vocabulary(tokens: list[int], tmp_path: Path) -> None:
    embedding = nn.Sequential(nn.Embedding(9, 4))
    net = pf.adapt(embedding, {"0.weight": pf.TrainableTokens(tuple(range(3, 3 + len(tokens))))})
    pf.save(tmp_path, net, net.init(), format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "token_indices": tokens}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        pf.load(tmp_path, embedding)


def test_an_index_of_another_dtype_is_an_error(tmp_path: Path) -> None:
    """A truth value would be a mask to torch, and a number in eight bits, too."""
    net = pf.adapt(model(), {"weight": pf.SHiRA(rank=1)})
    pf.save(tmp_path, net, net.init())
    file = tmp_path / "adapter.safetensors"
    with safe_open(file, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118 - no mapping
    key = next(k for k in tensors if k.startswith("frozen/"))
    for wrong in (tensors[key].bool(), tensors[key].to(torch.uint8), tensors[key].float()):
        save_file({**tensors, key: wrong}, file, metadata)
        with pytest.raises(ValueError, match=str(file)):
            pf.load(tmp_path, model())


@pytest.mark.parametrize(
    ("index", "t", "says"),
    [
        (Index(3), torch.tensor([0, 2, 2]), ""),
        (Index(3, distinct=True), torch.tensor([0, 2, 2]), "has one place twice"),
        (Index(3, distinct=True), torch.tensor([2, 0, 1]), ""),
        (Index(3, least=-1), torch.tensor([-1, 2]), ""),
        (Index(3, least=-1), torch.tensor([-2, 2]), "has -2; it must be from -1 to 2"),
        (Index((2, 4), distinct=True), torch.tensor([[1, 1, 0], [0, 3, 3]]), ""),
        (Index((2, 4), distinct=True), torch.tensor([[1, 0, 1], [3, 3, 3]]), "has one place twice"),
        (Index((2, 4)), torch.tensor([[1, 2], [0, 0]]), "has 2; it must be from 0 to 1"),
        (Index((2, 4)), torch.zeros(3, 2, dtype=torch.int64), "has 3 rows, and needs 2"),
        (Index(5, distinct=True), torch.empty(0, dtype=torch.int64), ""),
        (Index(5, distinct=True), torch.tensor([[4, 1], [1, 4]]), ""),  # of two experts
        (Index(5, distinct=True), torch.tensor([[4, 1], [2, 2]]), "has one place twice"),
    ],
)
def test_what_an_index_may_be(index: Index, t: torch.Tensor, says: str) -> None:
    assert index.wrong(t) == says
