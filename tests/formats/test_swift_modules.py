"""ms-swift's tuners around modules: files made as it writes them, against its formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
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


# Tuners of a whole model.


def llama(layers: int = 4) -> Any:
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 19}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**size, num_hidden_layers=layers, num_key_value_heads=1)).eval()


IDS = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(0))
RES = {"swift_type": "RESTUNING", "dims": 8, "tuner_cfg": "res_adapter", "target_modules_hook": "input"}


@pytest.mark.parametrize(
    "root",
    [{}, {"root_modules": r"model\.layers\.1"}, {"root_modules": r"model\.layers\.0", "root_modules_hook": "output"}],
    ids=str,
)
def test_restuning(root: dict[str, str], tmp_path: Path) -> None:
    """Its formula in hooks of torch. Without a root, the path begins with what goes into the first stem."""
    base, t = llama(), {}
    for i in range(3):
        for side in ("lateral", "vertical"):
            at = f"restuning_default.bypass_blocks.{i}.{side}_tuner.tuner"
            t |= {k: v + 0.1 * i for k, v in two(f"{at}.ln1", f"{at}.ln2", 4).items()}
    stems = [f"model.layers.{i}" for i in (1, 2, 3)]
    config: dict[str, Any] = {**RES, "stem_modules": stems, "target_modules": r"model\.norm", **root}
    seen: dict[str, Tensor] = {}
    hooks = []
    for n in ("model.layers.0", *stems):
        layer = base.get_submodule(n)
        hooks.append(layer.register_forward_pre_hook(lambda m, args, n=n: seen.update({f"into {n}": args[0].detach()})))
        hooks.append(layer.register_forward_hook(lambda m, args, y, n=n: seen.update({n: y.detach()})))

    def target(m: Any, args: Any) -> Any:
        first = root.get("root_modules", stems[0]).replace("\\", "")
        b = seen[first if "root_modules_hook" in root else f"into {first}"]
        for i, n in enumerate(stems):
            at = f"restuning_default.bypass_blocks.{i}"
            lateral, vertical = (f"{at}.{side}_tuner.tuner" for side in ("lateral", "vertical"))
            side = seen[n] + run(t, f"{lateral}.ln1", f"{lateral}.ln2", seen[n])
            b = side + b + run(t, f"{vertical}.ln1", f"{vertical}.ln2", b)
        return (b,)

    hooks.append(base.model.norm.register_forward_pre_hook(target))
    want = base(IDS).logits
    for hook in hooks:
        hook.remove()
    net, a = pf.load(folder(tmp_path, config, t), base)
    torch.testing.assert_close(net.apply(a, IDS).logits, want)
    pattern = {**config, "stem_modules": r"model\.layers\.[123]"}  # in the model's order
    again, b = pf.load(folder(tmp_path, pattern, t), base)
    assert torch.equal(again.apply(b, IDS).logits, net.apply(a, IDS).logits)


@pytest.mark.parametrize("groups", [None, 2, 4])
def test_llamapro(groups: int | None, tmp_path: Path) -> None:
    """The model with the new blocks in its list, whose tensors are saved under the numbers that they have there."""
    base, wide = llama(), llama(4 + (groups or 2))
    state, t, layers, each = base.state_dict(), {}, 0, 4 // (groups or 2)
    for i in range(4):
        block = {k: v for k, v in state.items() if k.startswith(f"model.layers.{i}.")}
        for copy in range(1 + ((i + 1) % each == 0)):
            new = {
                k.replace(f"layers.{i}.", f"layers.{layers}."): v + 0.1 * copy * torch.randn_like(v)
                for k, v in block.items()
            }
            t |= new if copy else {}
            wide.load_state_dict(new, strict=False)
            layers += 1
    wide.load_state_dict({k: v for k, v in state.items() if ".layers." not in k}, strict=False)
    config = {"swift_type": "LLAMAPRO", "model_type": "llama", "num_new_blocks": 2, "num_groups": groups}
    net, a = pf.load(folder(tmp_path, config, {k: v.clone() for k, v in t.items()}), base)
    torch.testing.assert_close(net.apply(a, IDS).logits, wide(IDS).logits)
    assert (base(IDS).logits - wide(IDS).logits).abs().max() > 1e-2
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(net.apply(a, IDS, method="generate", **kwargs), wide.generate(IDS, **kwargs))
    with pytest.raises(ValueError, match=r"num_groups is 2, and the model has 3 blocks"):
        pf.load(folder(tmp_path, config | {"num_groups": 2}, t), llama(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem_modules_hook": "input"}, "stem_modules_hook is 'input'; this release reads 'output'"),
        ({"use_upsample": True}, "use_upsample is True"),
        ({"tuner_cfg": "res_group_adapter"}, "tuner_cfg is 'res_group_adapter'"),
        ({"target_modules": "nothing"}, "target_modules is 'nothing', which matches none"),
        ({"target_hidden_pos": 1}, "target_hidden_pos is 1"),
    ],
    ids=str,
)
def test_restuning_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    t: dict[str, Tensor] = {}
    for side in ("lateral", "vertical"):
        at = f"restuning_default.bypass_blocks.0.{side}_tuner.tuner"
        t |= two(f"{at}.ln1", f"{at}.ln2", 4)
    config = {**RES, "stem_modules": ["model.layers.0"], "target_modules": r"model\.norm", **change}
    with pytest.raises(ValueError, match=message):
        pf.load(folder(tmp_path, config, t), llama(2))


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method_name": "feed_forward_chunk"}, "method_name is 'feed_forward_chunk'"),
        ({"hidden_pos": 1}, "hidden_pos is 1"),
        ({"act_layer": "mish"}, "act_layer is 'mish'"),
        ({"swift_type": "PROMPT"}, "PROMPT puts its first prompt behind the embeddings"),
        ({"swift_type": "RESTUNING", "stem_modules": "other"}, "stem_modules is 'other', which matches none"),
        ({"swift_type": "LLAMAPRO", "num_new_blocks": 1}, "not those of blocks in one list"),
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
