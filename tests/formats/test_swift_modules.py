"""ms-swift's tuners around modules: files made as it writes them, against its formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.stem(x).flatten(2).mT)
        return self.head(h)  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    (path / "default").mkdir(exist_ok=True)
    (path / "default" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "default" / "adapter_model.safetensors")
    return path


def two(first: str, second: str, rank: int, d: int = 8) -> dict[str, Tensor]:
    shapes = {f"{first}.weight": (rank, d), f"{first}.bias": (rank,), f"{second}.weight": (d, rank)}
    g = torch.Generator().manual_seed(rank)
    return {k: 0.5 * torch.randn(s, generator=g) for k, s in {**shapes, f"{second}.bias": (d,)}.items()}


def run(t: dict[str, Tensor], first: str, second: str, h: Tensor) -> Tensor:
    return F.linear(
        F.gelu(F.linear(h, t[f"{first}.weight"], t[f"{first}.bias"])), t[f"{second}.weight"], t[f"{second}.bias"]
    )


def test_adapter(model: Net, tmp_path: Path) -> None:
    at = "block.adapter_default"
    t = two(f"{at}.linear1", f"{at}.linear2", 4)
    config = {"swift_type": "ADAPTER", "dim": 8, "adapter_length": 4, "act_layer": "gelu", "hidden_pos": 0}
    net, a = pf.load(folder(tmp_path, {**config, "method_name": "forward", "target_modules": "block"}, t), model)
    h = model.block(model.stem(X).flatten(2).mT)
    torch.testing.assert_close(net.apply(a, X), model.head(h + run(t, f"{at}.linear1", f"{at}.linear2", h)))


def test_side(model: Net, tmp_path: Path) -> None:
    at = "block.side_default"
    t = {f"{at}.alpha": torch.tensor(0.7)} | two(f"{at}.side_net.fc1", f"{at}.side_net.fc2", 8)
    net, a = pf.load(folder(tmp_path, {"swift_type": "SIDE", "dim": 8, "side_module_name": "mlp"}, t), model)
    x = model.stem(X).flatten(2).mT
    share = torch.tensor(0.7).sigmoid()
    y = share * model.block(x) + (1 - share) * run(t, f"{at}.side_net.fc1", f"{at}.side_net.fc2", x)
    torch.testing.assert_close(net.apply(a, X), model.head(y))


def test_scetuning(model: Net, tmp_path: Path) -> None:
    at = "stem.scetuner_default.tuner_op"
    t = two(f"{at}.ln1", f"{at}.ln2", 4)
    config = {
        "swift_type": "SCETuning",
        "dims": 8,
        "tuner_mode": "encoder",
        "tuner_op": "SCEAdapter",
        "down_ratio": 0.5,
    }
    net, a = pf.load(folder(tmp_path, config, t), model)
    h = model.stem(X)
    h = h + run(t, f"{at}.ln1", f"{at}.ln2", h.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(net.apply(a, X), model.head(model.block(h.flatten(2).mT)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method_name": "feed_forward_chunk"}, "method_name is 'feed_forward_chunk'"),
        ({"hidden_pos": 1}, "hidden_pos is 1"),
        ({"act_layer": "mish"}, "act_layer is 'mish'"),
        ({"swift_type": "RESTUNING"}, "swift_type is 'RESTUNING'"),
    ],
    ids=str,
)
def test_refuses(change: dict[str, Any], message: str, model: Net, tmp_path: Path) -> None:
    at = "block.adapter_default"
    path = folder(tmp_path, {"swift_type": "ADAPTER", **change}, two(f"{at}.linear1", f"{at}.linear2", 4))
    with pytest.raises(ValueError, match=message):
        pf.load(path, model)


def test_names_what_has_no_place(model: Net, tmp_path: Path) -> None:
    t = two("other.adapter_default.linear1", "other.adapter_default.linear2", 4)
    with pytest.raises(ValueError, match=r"other.adapter_default.linear1.bias"):
        pf.load(folder(tmp_path, {"swift_type": "ADAPTER"}, t), model)
