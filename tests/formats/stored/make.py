"""Writes the adapters of this folder: `python tests/formats/stored/make.py NAME`, into the new folder NAME beside it.

They stay as they are, so that what a release wrote loads in every later one (`tests/formats/test_stored.py`). A release
that writes something new adds a folder of its name. Weights and leaves follow from numbers alone, not from a generator.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfn as pf
from peftfn.method import registry

HERE = Path(__file__).parent
RULES: dict[str, dict[str, dict[str, pf.Method]]] = {
    "native": {
        "several": {"q_proj": pf.LoRA(2), "v_proj": pf.chain(pf.IA3(), pf.DoRA(2)), "norm": pf.Full()},
        "modules": {"0.q_proj": pf.Bottleneck(2), "1.v_proj": pf.LoReFT(2)},
    },
    "peft": {
        "lora": {"0.*q_proj": pf.LoRA(2, alpha=3), "1.*q_proj": pf.LoRA(1, alpha=3), "norm": pf.Full()},
        "vera": {"q_proj": pf.VeRA(2)},
        "miss": {"q_proj": pf.MiSS(2)},
    },
    "swift": {"lora": {"q_proj": pf.LoRA(2)}, "part": {"norm": pf.Full()}},
    "mlx": {"lora": {"q_proj": pf.LoRA(2, alpha=6)}, "dora": {"v_proj": pf.DoRA(2)}},
    "kohya": {"lora": {"q_proj": pf.LoRA(2, alpha=1)}, "loha": {"v_proj": pf.LoHa(2)}},
}
"""Format → name → rules for `Small`."""


def numbers(shape: Any, start: float) -> Tensor:
    """Values between −0.5 and 0.5 that no two places share."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.5 * torch.sin(start + 1.7 * count)).float().reshape(shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.v_proj(torch.tanh(self.q_proj(x)))
        return y


class Small(nn.Module):
    """Two layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(8)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(numbers(p.shape, i))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.norm(x)
        return y


class Many(nn.Module):
    """A linear layer for each method that changes a weight."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(12, 12) for name in names})
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(numbers(p.shape, i) + (torch.eye(12) if p.dim() > 1 else 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers.values()])


def filled(net: pf.Adapted) -> pf.Adapter:
    """An adapter of numbers."""
    start = iter(range(1, 10**6))

    def of(tree: Any) -> Any:
        return (
            {k: of(v) for k, v in tree.items()} if isinstance(tree, dict) else numbers(tree.shape, next(start)) + tree
        )

    return of(net.init(0))  # type: ignore[no-any-return]


def inputs(model: nn.Module) -> Tensor:
    return numbers((2, 12 if isinstance(model, Many) else 8), 0.3)


def output(net: pf.Adapted, a: pf.Adapter) -> Tensor:
    with torch.no_grad():
        y: Tensor = net.apply(a, inputs(net.model))
    return y


def write(folder: Path) -> None:
    outputs = {}
    for format, named in RULES.items():
        for name, rules in named.items():
            net = pf.adapt(Small().eval(), rules)
            a = filled(net)
            where = folder / format / (f"{name}.safetensors" if format == "kohya" else name)
            pf.save(where, net, a, format=format)
            outputs[f"{format}/{where.name}"] = output(net, a)
    bone = folder / "peft" / "bone"  # what PEFT 0.14 to 0.17 called MiSS
    bone.mkdir()
    config = json.loads((folder / "peft" / "miss" / "adapter_config.json").read_text())
    (bone / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    tensors = load_file(folder / "peft" / "miss" / "adapter_model.safetensors")
    save_file({k.replace("miss_", "bone_"): t for k, t in tensors.items()}, bone / "adapter_model.safetensors")
    outputs["peft/bone"] = outputs["peft/miss"]
    methods = {n: c(**c.cases[0]) for n, c in registry.items() if issubclass(c, pf.Weight) and c.cases}
    methods = {n: m for n, m in sorted(methods.items()) if linear(m)}
    net = pf.adapt(Many(list(methods)).eval(), {rf"^layers\.{n}\.weight$": m for n, m in methods.items()})
    a = filled(net)
    pf.save(folder / "native" / "methods", net, a)
    outputs["native/methods"] = output(net, a)
    for card in folder.rglob("README.md"):
        card.unlink()
    save_file({k: t.clone() for k, t in outputs.items()}, folder / "outputs.safetensors")


def linear(method: pf.Method) -> bool:
    """Whether a linear layer of 12 features takes the method."""
    try:
        pf.adapt(nn.Linear(12, 12), {"weight": method})
    except ValueError as e:
        print(f"left out: {method}: {e}")
        return False
    return True


if __name__ == "__main__":
    write(HERE / sys.argv[1])
