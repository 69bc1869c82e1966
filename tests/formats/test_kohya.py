"""kohya's and diffusers' files: against lycoris-lora where it writes them, and against a small writer."""

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfn as pf
from peftfn.core.method import registry
from peftfn.formats.kohya import FILE
from peftfn.formats.kohya_keys import ENDS, Names
from peftfn.formats.kohya_unet import older
from peftfn.model.model import Model


class Net(nn.Module):
    """Every layer lycoris knows, with underscores in the names, a norm, and no equal sizes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.proj_in = nn.Conv2d(3, 8, 3, padding=1)
            self.down_blocks = nn.ModuleList([nn.Conv2d(8, 12, (3, 2), groups=2), nn.Conv2d(12, 6, 1, bias=False)])
            self.line = nn.Conv1d(6, 10, 2)
            self.attn = nn.ModuleDict({"to_q": nn.Linear(10, 12), "to_out": nn.ModuleList([nn.Linear(12, 20)])})
            self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor) -> Tensor:  # [b, 3, 5, 5]
        for layer in (self.proj_in, *self.down_blocks):
            x = torch.tanh(layer(x))
        x = torch.tanh(self.line(x.flatten(2))).mT
        return self.norm(self.attn["to_out"][0](torch.tanh(self.attn["to_q"](x))))


LAYERS = ["proj_in", "down_blocks.0", "down_blocks.1", "line", "attn.to_q", "attn.to_out.0"]


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.fixture(scope="module")
def lycoris() -> Iterator[Callable[[str], Any]]:
    """Modules of lycoris-lora by name, without its packages' own `__init__`, which ask for einops and toml."""
    root = Path(torch.__file__).parent.parent / "lycoris"
    assert (root / "modules" / "locon.py").is_file(), "lycoris-lora is one of the tests' requirements"
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name, path in {"lycoris": root, "lycoris.modules": root / "modules"}.items():
            package = types.ModuleType(name)
            package.__path__ = [str(path)]  # type: ignore[attr-defined]
            patch.setitem(sys.modules, name, package)
        names = ("locon", "loha", "lokr", "full", "norms", "glora", "diag_oft", "ia3")
        with pytest.MonkeyPatch.context() as without:
            for slow in ("peft", "peft.tuners.tuners_utils", "bitsandbytes", "bitsandbytes.nn"):
                without.setitem(sys.modules, slow, None)  # lycoris looks whether a layer is one of theirs
            modules = {name: importlib.import_module(f"lycoris.modules.{name}") for name in names}
        yield modules.__getitem__
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "lycoris":
            del sys.modules[name]


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("locon", "LoConModule", {}),
    "lora tucker": ("locon", "LoConModule", {"use_tucker": True}),
    "lora rslora": ("locon", "LoConModule", {"rs_lora": True}),
    "lora scalar": ("locon", "LoConModule", {"use_scalar": True}),
    "dora": ("locon", "LoConModule", {"weight_decompose": True}),
    "dora tucker": ("locon", "LoConModule", {"weight_decompose": True, "use_tucker": True}),
    "dora input": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "dora input tucker": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False, "use_tucker": True}),
    "loha": ("loha", "LohaModule", {}),
    "loha tucker": ("loha", "LohaModule", {"use_tucker": True}),
    "loha wd": ("loha", "LohaModule", {"weight_decompose": True}),
    "loha input": ("loha", "LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "lokr input": ("lokr", "LokrModule", {"weight_decompose": True, "wd_on_out": False, "lora_dim": 1}),
    "lokr": ("lokr", "LokrModule", {}),
    "lokr tucker": ("lokr", "LokrModule", {"use_tucker": True, "lora_dim": 1}),
    "lokr both": ("lokr", "LokrModule", {"decompose_both": True, "lora_dim": 1, "factor": 4}),
    "lokr full": ("lokr", "LokrModule", {"full_matrix": True}),
    "lokr wd": ("lokr", "LokrModule", {"weight_decompose": True, "lora_dim": 1}),
    "lokr factor": ("lokr", "LokrModule", {"factor": 3, "lora_dim": 1}),
    "glora": ("glora", "GLoRAModule", {}),
    "glora scalar": ("glora", "GLoRAModule", {"use_scalar": True}),
    "diag-oft": ("diag_oft", "DiagOFTModule", {}),
    "diag-oft bound": ("diag_oft", "DiagOFTModule", {"constraint": 0.05, "rescaled": True}),
    "ia3": ("ia3", "IA3Module", {}),
    "ia3 input": ("ia3", "IA3Module", {"train_on_input": True}),
}
GROUPED = {"glora": "down_blocks.0", "glora scalar": "down_blocks.0", "ia3 input": "down_blocks.0"}
"""Cases in which lycoris' own forward fails at a convolution with groups."""


def written(lycoris: Callable[[str], Any], model: Net, case: str, prefix: str = "lora_unet") -> tuple[Any, Any]:
    """(lycoris' modules by layer, the tensors they save): all parameters random."""
    file, cls, options = CASES[case]
    options = {"lora_dim": 2, "alpha": 3, **options}
    modules, out = {}, {}
    for i, layer in enumerate(n for n in LAYERS if n != GROUPED.get(case)):
        name = f"{prefix}_{layer}".replace(".", "_")
        module = getattr(lycoris(file), cls)(name, model.get_submodule(layer), 1.0, **options)
        with torch.no_grad():
            for j, p in enumerate(module.parameters()):
                p.copy_(p.abs().mean() + noise(*p.shape or (1,), seed=10 * i + j).view(p.shape))
        modules[layer] = module
        out |= {
            f"{name}.{k}": v.detach().clone().contiguous()
            for k, v in (module.custom_state_dict() or module.state_dict()).items()
        }
    return modules, out


def under(model: Net, modules: Any) -> Tensor:
    """What lycoris computes: each layer's forward through its module."""
    handles = []
    try:
        for layer, module in modules.items():
            real = model.get_submodule(layer)
            module.org_forward, before = real.forward, real.forward
            real.forward = module.forward
            handles.append((real, before))
        return model(x())
    finally:
        for real, _ in handles:
            del real.forward


@pytest.mark.parametrize("case", CASES)
def test_lycoris_file_gives_lycoris_outputs(case: str, lycoris: Any, tmp_path: Path) -> None:
    model = Net()
    modules, tensors = written(lycoris, model, case)
    save_file(tensors, tmp_path / "file.safetensors")
    net, adapter = pf.load(tmp_path / "file.safetensors", model)
    assert list(dict.fromkeys(s.rpartition(".")[0] for s in net.plan)) == list(modules)
    expected, ours = under(model, modules), net.apply(adapter, x())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - model(x())).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_lycoris_reads(case: str, lycoris: Any, tmp_path: Path) -> None:
    model = Net()
    modules, tensors = written(lycoris, model, case)
    save_file(tensors, tmp_path / "theirs.safetensors")
    net, adapter = pf.load(tmp_path / "theirs.safetensors", model)
    pf.save(tmp_path / "ours", net, adapter, format="kohya")
    ours = load_file(tmp_path / "ours" / FILE)
    file, cls, options = CASES[case]
    if folded := case in (
        "lora tucker",
        "dora tucker",
        "dora input tucker",
    ):  # its core is multiplied into the down factor
        options = {k: v for k, v in options.items() if k != "use_tucker"}
    assert folded or {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in tensors.items()}
    again = {}
    for layer, module in modules.items():
        name = module.lora_name
        again[layer] = getattr(lycoris(file), cls)(
            name, model.get_submodule(layer), 1.0, **{"lora_dim": 2, "alpha": 3, **options}
        )
        mine = {k.removeprefix(f"{name}."): t for k, t in ours.items() if k.startswith(f"{name}.")}
        missing, unexpected = again[layer].load_state_dict(mine, strict=False)
        assert set(missing) <= {"scalar"}
        assert not unexpected
    torch.testing.assert_close(under(model, again), net.apply(adapter, x()), rtol=1e-4, atol=1e-5)


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = {"to_q": nn.Linear(6, 6), "conv_in": nn.Conv2d(2, 4, 3), "norm": nn.LayerNorm(6)}
        return nn.ModuleDict({"mid_block": nn.ModuleDict(layers), "head": nn.Linear(6, 5)})


def lora(name: str, up: str, down: str, alpha: float | None = None, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of `small`'s mid_block.to_q, as a file has it."""
    out = {f"{name}.{down}": noise(rank, 6, seed=1), f"{name}.{up}": noise(6, rank, seed=2)}
    return out | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def put(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path / "file.safetensors", metadata=metadata or None)
    return path / "file.safetensors"


NAMES = {
    "kohya": ("lora_unet_mid_block_to_q", "lora_up.weight", "lora_down.weight"),
    "kohya, text encoder": ("lora_te1_mid_block_to_q", "lora_up.weight", "lora_down.weight"),
    "lycoris": ("lycoris_mid_block_to_q", "lora_up.weight", "lora_down.weight"),
    "diffusers": ("unet.mid_block.to_q", "lora.up.weight", "lora.down.weight"),
    "diffusers, PEFT's names": ("transformer.mid_block.to_q", "lora_B.weight", "lora_A.weight"),
    "diffusers, 2023": ("text_encoder.mid_block.to_q", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "ComfyUI": ("diffusion_model.mid_block.to_q", "lora_B.weight", "lora_A.weight"),
    "no prefix": ("mid_block.to_q", "lora_B.weight", "lora_A.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("style", NAMES)
def test_every_spelling_of_a_lora_is_read(style: str, alpha: float | None, tmp_path: Path) -> None:
    tensors = lora(*NAMES[style], alpha)
    net, adapter = pf.load(put(tmp_path, tensors), small())
    b, a = noise(6, 2, seed=2), noise(2, 6, seed=1)
    assert list(net.plan) == ["mid_block.to_q.weight"]
    torch.testing.assert_close(net.delta(adapter)["mid_block.to_q.weight"], (alpha or 2) / 2 * b @ a)


def test_a_name_that_means_two_modules_is_an_error_naming_both(tmp_path: Path) -> None:
    inner = nn.ModuleDict({"c": nn.Linear(6, 6)}), nn.ModuleDict({"b_c": nn.Linear(6, 6)})
    model = nn.ModuleDict({"a_b": inner[0], "a": inner[1]})
    file = put(tmp_path, lora("lora_unet_a_b_c", "lora_up.weight", "lora_down.weight"))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"lora_unet_a_b_c may be a\.b_c or a_b\.c"):
            pf.load(file, model, strict=strict)
    net = pf.adapt(model, {r"a_b\.c\.weight": pf.LoRA(rank=2)})
    with pytest.raises(ValueError, match=r"may be a\.b_c or a_b\.c"):
        pf.save(tmp_path / "out", net, net.init(), format="kohya")
    assert not (tmp_path / "out").exists()
    pf.save(tmp_path / "out", net, net.init(), format="kohya", layout="diffusers")
    assert list(pf.load(tmp_path / "out", model).net.plan) == ["a_b.c.weight"]


def test_parts_of_a_pipeline_have_their_own_prefixes(tmp_path: Path) -> None:
    pipe = nn.ModuleDict({"unet": small(), "text_encoder": small(), "text_encoder_2": small()})
    net = pf.adapt(pipe, {r"to_q\.weight": pf.LoRA(rank=2, init_weights="random")})
    adapter = net.init(1)
    for layout, heads in {
        "kohya": ["lora_te1_mid_block_to_q", "lora_te2_mid_block_to_q", "lora_unet_mid_block_to_q"],
        "diffusers": [f"{p}.mid_block.to_q" for p in ("text_encoder", "text_encoder_2", "unet")],
    }.items():
        pf.save(tmp_path / layout, net, adapter, format="kohya", layout=layout)
        names = load_file(tmp_path / layout / FILE)
        assert sorted({n.partition(".lora_")[0].removesuffix(".alpha") for n in names}) == heads
        again = pf.load(tmp_path / layout, pipe)
        same(net.delta(adapter), again.net.delta(again.adapter))
    with pytest.raises(ValueError, match=r"no place in this model: 'lora_te1_mid_block_to_q\.alpha'"):
        pf.load(tmp_path / "kohya", nn.ModuleDict({"unet": small()}))
    with pytest.raises(ValueError, match="kohya has lora_unet"):
        pf.save(tmp_path / "x", net, adapter, format="kohya", prefix="nope")


def test_one_part_of_a_file_is_read_with_strict_false(tmp_path: Path) -> None:
    ours = lora("lora_unet_mid_block_to_q", "lora_up.weight", "lora_down.weight")
    theirs = lora("lora_te_text_model_layers_0", "lora_up.weight", "lora_down.weight")
    file = put(tmp_path, ours | theirs)
    with pytest.raises(ValueError, match="2 tensors have no place in this model: 'lora_te_text"):
        pf.load(file, small())
    loaded = pf.load(file, small(), strict=False)
    assert loaded.unexpected == tuple(sorted(theirs))
    assert list(loaded.net.plan) == ["mid_block.to_q.weight"]
    with pytest.raises(ValueError, match="no adapter tensors that fit"):
        pf.load(put(tmp_path, theirs), small(), strict=False)


def text_encoder() -> nn.Module:
    """CLIP's text model as transformers 5 has it: without the `text_model` that all files have in their names."""
    attention = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    parts = {"embeddings": nn.Embedding(4, 6), "encoder": layers, "final_layer_norm": nn.LayerNorm(6)}
    return nn.ModuleDict(parts)


TEXT = {
    "kohya": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_up.weight", "lora_down.weight"),
    "diffusers": ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "lora_B.weight", "lora_A.weight"),
}


@pytest.mark.parametrize("layout", TEXT)
@pytest.mark.parametrize("part", [None, "text_encoder"])
def test_a_text_encoder_keeps_the_name_that_all_files_have(part: str | None, layout: str, tmp_path: Path) -> None:
    name, up, down = TEXT[layout]
    model = text_encoder() if part is None else nn.ModuleDict({part: text_encoder(), "unet": small()})
    net, adapter = pf.load(put(tmp_path, lora(name, up, down)), model)
    site = "encoder.layers.0.self_attn.q_proj.weight"
    assert list(net.plan) == [site if part is None else f"{part}.{site}"]
    prefix = {"kohya": "lora_te", "diffusers": "text_encoder"}[layout] if part is None else None
    pf.save(tmp_path / "out", net, adapter, format="kohya", layout=layout, prefix=prefix)
    assert {k.removesuffix(".alpha").partition(".lora_")[0] for k in load_file(tmp_path / "out" / FILE)} == {name}
    same(net.delta(adapter), pf.load(tmp_path / "out", model).net.delta(pf.load(tmp_path / "out", model).adapter))


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_diffusers_first_files_name_attention_processors(prefix: str, tmp_path: Path) -> None:
    layers = {"to_q": nn.Linear(6, 6), "to_out": nn.ModuleList([nn.Linear(6, 6)])}
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn1": nn.ModuleDict(layers)})})
    tensors = {}
    for name in ("to_q", "to_out"):
        tensors |= lora(f"{prefix}block.attn1.processor.{name}_lora", "up.weight", "down.weight")
    net, adapter = pf.load(put(tmp_path, tensors), model)
    assert list(net.plan) == ["block.attn1.to_q.weight", "block.attn1.to_out.0.weight"]
    torch.testing.assert_close(net.delta(adapter)["block.attn1.to_q.weight"], noise(6, 2, seed=2) @ noise(2, 6, seed=1))


def unet() -> nn.Module:
    """SDXL's modules of diffusers, by name, each a small layer: 3 blocks of 2, attention in all but the outermost."""

    def resnet() -> nn.Module:
        names = {"norm1": nn.GroupNorm(2, 4), "conv1": nn.Conv2d(4, 4, 3), "time_emb_proj": nn.Linear(6, 4)}
        names |= {"norm2": nn.GroupNorm(2, 4), "conv2": nn.Conv2d(4, 4, 3), "conv_shortcut": nn.Conv2d(4, 4, 1)}
        return nn.ModuleDict(names)

    def attention() -> nn.Module:
        block = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "norm1": nn.LayerNorm(4)})
        return nn.ModuleDict({"proj_in": nn.Linear(4, 4), "transformer_blocks": nn.ModuleList([block])})

    def block(resnets: int, attends: bool, sampler: str | None) -> nn.Module:
        out = {"resnets": nn.ModuleList(resnet() for _ in range(resnets))}
        out |= {"attentions": nn.ModuleList(attention() for _ in range(resnets))} if attends else {}
        conv = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})])
        return nn.ModuleDict(out | ({sampler: conv} if sampler else {}))

    down, up = ([False, True, True], "downsamplers", 2), ([True, True, False], "upsamplers", 3)
    sides = {
        side: nn.ModuleList(block(n, a, sampler if i < 2 else None) for i, a in enumerate(attends))
        for side, (attends, sampler, n) in {"down_blocks": down, "up_blocks": up}.items()
    }
    middle = {"resnets": nn.ModuleList([resnet(), resnet()]), "attentions": nn.ModuleList([attention()])}
    ends = {"conv_in": nn.Conv2d(4, 4, 3), "conv_out": nn.Conv2d(4, 4, 3), "conv_norm_out": nn.GroupNorm(2, 4)}
    for name in ("time_embedding", "add_embedding"):
        ends[name] = nn.ModuleDict({"linear_1": nn.Linear(4, 6), "linear_2": nn.Linear(6, 6)})
    return nn.ModuleDict({**sides, "mid_block": nn.ModuleDict(middle), **ends})


OLDER = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_8_0_out_layers_3": "down_blocks.2.resnets.1.conv2",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_in": "up_blocks.1.attentions.2.proj_in",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}
"""SDXL's names in kohya's files → diffusers', as diffusers converts them."""


@pytest.mark.parametrize("part", ["", "unet."])
def test_the_older_names_of_a_unet_are_read(part: str, tmp_path: Path) -> None:
    model = unet() if not part else nn.ModuleDict({"unet": unet()})
    tensors = {}
    for old, new in OLDER.items():
        w = model.get_submodule(part + new).weight
        tensors |= {f"lora_unet_{old}.lora_down.weight": noise(2, *w.shape[1:])}
        tensors |= {f"lora_unet_{old}.lora_up.weight": noise(w.shape[0], 2, *(1,) * (w.dim() - 2))}
    net, _ = pf.load(put(tmp_path, tensors), model)
    assert set(net.plan) == {f"{part}{new}.weight" for new in OLDER.values()}
    names = Names(Model.of(model))
    every = [m for m, attr in names.sites if attr == "weight"]
    old = [older(m.removeprefix(part), names.unet) for m in every]
    assert None not in old and len(set(old)) == len(every) > 100


def test_there_are_no_older_names_elsewhere() -> None:
    assert older("down_blocks.0.attn", {"down_blocks.0.attn"}) is None
    assert older("time_embedding.linear_1", {"time_embedding.linear_1"}) is None


def test_key_mapping_renames_modules(tmp_path: Path) -> None:
    file = put(tmp_path, lora("lora_unet_middle_attn", "lora_up.weight", "lora_down.weight"))
    net, _ = pf.load(file, small(), key_mapping={"middle_attn$": "mid_block_to_q"})
    assert list(net.plan) == ["mid_block.to_q.weight"]
    with pytest.raises(ValueError, match="key_mapping has '\\(', which is not a regular expression"):
        pf.load(file, small(), key_mapping={"(": ""})


def test_scale_from_diffusers_metadata(tmp_path: Path) -> None:
    """A scale that is written in the metadata alone must not be lost."""
    tensors = lora("unet.mid_block.to_q", "lora_B.weight", "lora_A.weight")
    config = {"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {"head": 9}, "unet.peft_type": "LORA"}
    file = put(tmp_path, tensors, lora_adapter_metadata=json.dumps(config))
    net, adapter = pf.load(file, small())
    expected = 2.5 * noise(6, 2, seed=2) @ noise(2, 6, seed=1)
    torch.testing.assert_close(net.delta(adapter)["mid_block.to_q.weight"], expected)
    for bad in ("[]", "{", json.dumps(config | {"unet.lora_alpha": "x"})):
        with pytest.raises(ValueError, match=r"file\.safetensors"):
            pf.load(put(tmp_path, tensors, lora_adapter_metadata=bad), small())


ALL = {"LoRA", "DoRA", "LoHa", "LoKr", "InputDoRA", "GLoRALycoris", "DiagOFT", "IA3", "Full"}
WRITTEN = {"kohya": ALL, "diffusers": {"LoRA", "DoRA"}}
METHODS = [
    cls(**case)
    for name, cls in registry.items()
    if cls.__module__.startswith("peftfn.methods") and {"linear", "conv"} <= cls.kinds
    for case in (cls.cases if name in WRITTEN["kohya"] else cls.cases[:1])
]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def random_like(adapter: dict[str, Any]) -> dict[str, Any]:
    return {n: {k: t + noise(*t.shape, seed=i) for i, (k, t) in enumerate(p.items())} for n, p in adapter.items()}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_comes_back_or_is_refused_by_name(method: pf.Method, tmp_path: Path) -> None:
    """No method is written as something else: what is read means the same change, or nothing is written."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = {"to_q": nn.Linear(8, 6), "conv_in": nn.Conv2d(2, 6, 2)}
        model = nn.ModuleDict({"mid_block": nn.ModuleDict(layers)})
    net = pf.adapt(model, {r"weight$": method})
    adapter = random_like(net.init(1))
    for layout, names in WRITTEN.items():
        possible = type(method).__name__ in names
        possible &= layout == "diffusers" or not getattr(method, "lora_bias", False)
        possible &= not isinstance(method, pf.IA3) or not method.scales_bias
        if not possible:
            with pytest.raises(ValueError, match=r"^mid_block\.(to_q|conv_in)\.weight: "):
                pf.save(tmp_path / layout, net, adapter, format="kohya", layout=layout)
            assert not (tmp_path / layout).exists()
            continue
        pf.save(tmp_path / layout, net, adapter, format="kohya", layout=layout)
        loaded = pf.load(tmp_path / layout, model)
        assert loaded.unexpected == loaded.missing == ()
        same(net.delta(adapter), loaded.net.delta(loaded.adapter))
        same(net.bias_deltas(adapter), loaded.net.bias_deltas(loaded.adapter))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "method", [pf.LoRA(2, 3.0, rslora=True), pf.LoRA(2, 3.0, lora_bias=True), pf.DoRA(2, 3.0)], ids=str
)
def test_diffusers_layout_is_what_diffusers_gives_to_peft(method: pf.LoRA, tmp_path: Path) -> None:
    """diffusers reads no alpha here: it makes a LoraConfig with lora_alpha = r of the tensors' names and shapes."""
    import peft

    model = Net()
    net = pf.adapt(model, {r"(to_q|proj_in)\.weight": method})
    adapter = random_like(net.init())
    pf.save(tmp_path, net, adapter, format="kohya", layout="diffusers")
    tensors = {k.removeprefix("unet."): t for k, t in load_file(tmp_path / FILE).items()}
    options = {"use_dora": isinstance(method, pf.DoRA), "lora_bias": getattr(method, "lora_bias", False)}
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn.to_q", "proj_in"], **options)
    theirs = peft.get_peft_model(Net(), config).eval()
    result = peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": t for k, t in tensors.items()})
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if ".lora_" in k]
    torch.testing.assert_close(theirs(x()), net.apply(adapter, x()), rtol=1e-4, atol=1e-5)


def test_full_and_norms_are_lycoris_diffs(lycoris: Any, tmp_path: Path) -> None:
    model = small()
    net = pf.adapt(model, {r"norm|head|conv_in\.bias": pf.Full(), "to_q": pf.LoRA(rank=2, init_weights="random")})
    adapter = random_like(net.init())
    pf.save(tmp_path / "b.safetensors", net, adapter, format="kohya")
    found, merged = load_file(tmp_path / "b.safetensors"), net.merge(adapter)
    for file, cls, path in (("full", "FullModule", "head"), ("norms", "NormModule", "mid_block.norm")):
        made, name = getattr(lycoris(file), cls), f"lora_unet_{path}".replace(".", "_")
        with torch.no_grad():
            parts = made.extract_state_dict(found, name)
            weight, bias = made.make_module_from_state_dict(name, model.get_submodule(path), *parts).get_merged_weight()
        torch.testing.assert_close(weight, merged[f"{path}.weight"])
        torch.testing.assert_close(bias, merged[f"{path}.bias"])
    pf.save(tmp_path / "a.safetensors", net, adapter, format="kohya", dtype=torch.float64)
    tensors = load_file(tmp_path / "a.safetensors")
    names = {"mid_block_norm.w_norm", "mid_block_norm.b_norm", "head.diff", "head.diff_b", "mid_block_conv_in.diff_b"}
    assert {f"lora_unet_{n}" for n in names} == {n for n in tensors if "to_q" not in n}
    assert {t.dtype for n, t in tensors.items() if not n.endswith(".alpha")} == {torch.float64}
    again = pf.load(tmp_path / "a.safetensors", model)
    same(net.delta(adapter), {n: d.float() for n, d in again.net.delta(again.adapter).items()})


UP, DOWN = "lora_unet_mid_block_to_q.lora_up.weight", "lora_unet_mid_block_to_q.lora_down.weight"
Q = "lora_unet_mid_block_to_q"
IA3 = {UP: None, DOWN: None, f"{Q}.weight": torch.ones(6), f"{Q}.on_input": torch.tensor(0)}
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half of a LoRA": ({UP: None}, "lacks 1 tensors: 'lora_unet_mid_block_to_q.lora_up.weight'"),
    "wrong size": ({UP: torch.zeros(5, 2)}, r"lora_up.weight has shape \[5, 2\], and LoRA.* needs \[6, 2\]"),
    "one axis": ({DOWN: torch.zeros(12)}, r"lora_down.weight has shape \[12\]; it must be a matrix"),
    "no rank": ({UP: torch.zeros(6, 0), DOWN: torch.zeros(0, 6)}, "must be a matrix, not empty"),
    "integers": ({UP: torch.zeros(6, 2, dtype=torch.int32)}, "lora_up.weight is torch.int32"),
    "NaN": ({UP: torch.full((6, 2), float("nan"))}, "lora_up.weight contains 12 NaN"),
    "alpha is 0": ({f"{Q}.alpha": torch.tensor(0.0)}, "alpha is 0.0; it must be a finite number above 0"),
    "alpha is infinite": ({f"{Q}.alpha": torch.tensor(float("inf"))}, "alpha is inf"),
    "alphas": ({f"{Q}.alpha": torch.ones(3)}, r"alpha has shape \[3\]; it must be one number"),
    "two methods": ({f"{Q}.hada_w1_a": torch.zeros(6, 2)}, "are not the tensors of one method"),
    "two spellings": ({"unet.mid_block.to_q.lora_B.weight": torch.zeros(6, 2)}, "are the same tensor"),
    "alpha alone": ({"lora_unet_head.alpha": torch.tensor(1.0)}, "are not the tensors of one method"),
    "odd magnitude": ({f"{Q}.dora_scale": torch.ones(1, 5)}, r"dora_scale has shape \[1, 5\], and .* needs \[6\]"),
    "a turned magnitude of no layer": ({f"{Q}.dora_scale": torch.ones(5, 1)}, r"dora_scale has shape \[5, 1\]"),
    "a model's own weight": ({f"{Q}.weight": torch.ones(6, 6)}, "are not the tensors of one method"),
    "a model's weights": ({UP: None, DOWN: None, f"{Q}.weight": torch.ones(6, 6)}, "1 tensors have no place"),
    "an IA3 on neither side": ({**IA3, f"{Q}.on_input": torch.tensor(2)}, "on_input is 2.0; it must be 0 or 1"),
    "an IA3 of another size": ({**IA3, f"{Q}.weight": torch.ones(7)}, r"weight has shape \[7\].*needs \[6\]"),
    "a BOFT": ({UP: None, DOWN: None, f"{Q}.oft_blocks": torch.ones(1, 2, 3, 3)}, r"\[n, b, b\]"),
    "blocks of another size": ({UP: None, DOWN: None, f"{Q}.oft_blocks": torch.ones(2, 4, 4)}, "block_size is 4"),
    "half of a GLoRA": ({UP: None, DOWN: None, f"{Q}.a1.weight": torch.ones(6, 2)}, r"lacks 3 tensors.*a2\.weight"),
    "core at a linear layer": ({f"{Q}.lora_mid.weight": torch.ones(2, 2)}, "lora_mid.weight is"),
    "unknown layer": ({"lora_unet_mid_block_to_k.lora_up.weight": torch.ones(6, 2)}, "no place.*to_k.*near:"),
    "unknown tensor": ({f"{Q}.lora_side.weight": torch.ones(6, 2)}, "no place in this model: .*lora_side"),
    "a norm": ({"lora_unet_mid_block_norm.lora_up.weight": torch.ones(6, 2)}, "no place in this model"),
    "half of a LoHa": (
        {UP: None, DOWN: None, f"{Q}.hada_w1_a": torch.ones(6, 2), f"{Q}.hada_t1": torch.ones(2, 2)},
        "lacks 4 tensors: .*hada_t2",
    ),
    "LoKr of another size": (
        {UP: None, DOWN: None, f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(4, 4)},
        r"\[2, 2\] ⊗ \[4, 4\] has not the size of mid_block.to_q.weight, \[6, 6\]",
    ),
    "LoKr both full and not": (
        {UP: None, DOWN: None, **{f"{Q}.lokr_{k}": torch.ones(2, 2) for k in ("w1", "w1_a", "w1_b")}}
        | {f"{Q}.lokr_w2": torch.ones(3, 3)},
        "are not what LoKr",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_an_error_naming_file_and_key(what: str, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    tensors = lora(Q, "lora_up.weight", "lora_down.weight", 2.0) | change
    if UP in change and DOWN in change and change[UP] is None:
        del tensors[f"{Q}.alpha"]
    model = small()
    before = {n: (p, p._version) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as error:
        pf.load(put(tmp_path, {k: t for k, t in tensors.items() if t is not None}), model)
    assert "file.safetensors" in str(error.value)
    assert {n: (p, p._version) for n, p in model.named_parameters()} == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_refused_or_means_what_it_says(data: st.DataObject) -> None:
    """Shapes, names and dtypes changed at random: an error, or an adapter whose outputs are finite."""
    base = lora(Q, "lora_up.weight", "lora_down.weight", 3.0)
    base |= {f"lora_unet_mid_block_conv_in.{k}": noise(*s) for k, s in CONV.items()}
    tensors = dict(base)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        t = tensors.pop(key)
        match data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "end"])):
            case "rename":
                tensors[key.replace(data.draw(st.sampled_from(["_", ".", "w1", "a", "lora"])), "lora_", 1)] = t
            case "shape":
                tensors[key] = torch.ones(data.draw(st.lists(st.integers(0, 7), max_size=4)))
            case "dtype":
                tensors[key] = t.to(data.draw(st.sampled_from([torch.float16, torch.int64, torch.float64, torch.bool])))
            case "end":
                tensors[key.partition(".")[0] + "." + data.draw(st.sampled_from(sorted(ENDS)))] = t
    model = small()
    with tempfile.TemporaryDirectory() as folder:
        file = put(Path(folder), tensors or {"x": torch.zeros(1)})
        for strict in (True, False):
            try:
                loaded = pf.load(file, model, strict=strict)
            except ValueError as e:
                assert "file.safetensors" in str(e)
            else:
                assert all(d.isfinite().all() for d in loaded.net.delta(loaded.adapter).values())
                assert not strict or (not loaded.missing and not loaded.unexpected)


CONV = {"hada_w1_a": (2, 4), "hada_w1_b": (2, 2), "hada_w2_a": (2, 4), "hada_w2_b": (2, 2)}
CONV |= {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}


# Flux's first implementation has an attention's projections in one layer.


def flux() -> nn.Module:
    """The names of diffusers' Flux, with other sizes for each part."""
    with torch.random.fork_rng():
        torch.manual_seed(3)

        def attention(*extra: tuple[str, int]) -> nn.ModuleDict:
            return nn.ModuleDict({k: nn.Linear(6, n) for k, n in (("to_q", 4), ("to_k", 2), ("to_v", 5), *extra)})

        both = attention(("add_q_proj", 4), ("add_k_proj", 2), ("add_v_proj", 5), ("to_add_out", 6))
        double = {"attn": both, "ff": nn.ModuleDict({"net": nn.ModuleDict({"2": nn.Linear(6, 6)})})}
        single = {"attn": attention(), "proj_mlp": nn.Linear(6, 7), "proj_out": nn.Linear(6, 6)}
        blocks = {"transformer_blocks": double, "single_transformer_blocks": single}
        lists = {k: nn.ModuleList([nn.ModuleDict(block)]) for k, block in blocks.items()}
        return nn.ModuleDict(lists | {"x_embedder": nn.Linear(6, 6)})


FUSED = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{k}" for k in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{k}_proj" for k in "qkv"],
    "single_blocks.0.linear1": [*(f"single_transformer_blocks.0.attn.to_{k}" for k in "qkv"),
                                "single_transformer_blocks.0.proj_mlp"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "img_in": ["x_embedder"],
}  # fmt: skip
SPELLINGS: dict[str, Callable[[str], str]] = {
    "kohya": lambda name: f"lora_unet_{name}".replace(".", "_"),
    "ComfyUI": lambda name: f"diffusion_model.{name}",
    "plain": lambda name: name,
}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FUSED)
def test_projections_that_are_one_layer_in_the_file(name: str, spelling: str, dora: bool, tmp_path: Path) -> None:
    model = flux()
    parts = [model.get_submodule(n) for n in FUSED[name]]
    w = torch.cat([p.weight.detach() for p in parts])
    key, down, up, m = SPELLINGS[spelling](name), noise(2, 6), noise(len(w), 2, seed=1), noise(len(w), 1, seed=2)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
    net, a = pf.load(put(tmp_path, tensors | ({f"{key}.dora_scale": m} if dora else {})), model)
    assert set(net.plan) == {f"{n}.weight" for n in FUSED[name]}
    want = w + 1.5 * up @ down
    want = m * want / want.norm(dim=1, keepdim=True) if dora else want
    merged = net.merge(a)
    torch.testing.assert_close(torch.cat([merged[f"{n}.weight"] for n in FUSED[name]]), want)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (
            {"lora_down.weight": (2, 6), "lora_up.weight": (9, 2)},
            r"has shape \[9, 2\]; it must have 11 rows: \[4, 2, 5\]",
        ),
        ({"hada_w1_a": (11, 2), "hada_w1_b": (2, 6), "hada_w2_a": (11, 2), "hada_w2_b": (2, 6)}, "only LoRA and DoRA"),
        ({"lora_down.weight": (2, 6)}, "lacks 3 tensors"),
        ({"lora_down.weight": (2, 6), "lora_up.weight": (11, 3)}, "has shape"),
    ],
    ids=["rows", "method", "missing", "ranks"],
)
def test_one_layer_that_cannot_be_divided(ends: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    with pytest.raises(ValueError, match=message):
        pf.load(put(tmp_path, {f"{key}.{end}": noise(*shape) for end, shape in ends.items()}), flux())


@pytest.mark.parametrize(
    ("other", "ends", "rows"),
    [
        ("transformer_blocks.0.attn.to_k", ("lora_down.weight", "lora_up.weight"), 2),
        ("transformer_blocks.0.attn.to_k", ("lora_A.weight", "lora_B.weight"), 2),
        ("diffusion_model.double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight"), 11),
        ("diffusion_model.double_blocks.0.img_attn.qkv", ("lora_down.weight", "lora_up.weight"), 11),
    ],
)
def test_both_names_of_one_layer_are_not_both_read(
    other: str, ends: tuple[str, str], rows: int, tmp_path: Path
) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": noise(2, 6), f"{key}.lora_up.weight": noise(11, 2)}
    tensors |= {f"{other}.{ends[0]}": noise(2, 6), f"{other}.{ends[1]}": noise(rows, 2)}
    with pytest.raises(ValueError, match="are the same tensor"):
        pf.load(put(tmp_path, tensors), flux())
