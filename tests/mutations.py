"""Good files of every format, and files with something in them changed."""

import json
import random
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from models import by_name
from safetensors.torch import load_file, save_file
from support import randomised

import peftfn as pf
from peftfn.testing import shaken

MODEL = by_name["llama"].build()
KINDS = ("flip", "cut", "header", "json", "values")


Q, K, V, GATE = (rf"{n}_proj\.weight" for n in ["q", "k", "v", "gate"])
OTHERS: dict[str, list[dict[str, pf.Method]]] = {
    "mlx": [{Q: pf.LoRA(2, 3.0), V: pf.LoRA(2, 3.0)}, {Q: pf.DoRA(2, alpha=3)}],
    "swift": [{Q: pf.LoRA(2), V: pf.LoRA(2)}, {Q: pf.DoRA(2, alpha=3)}, {"norm": pf.Full()}],
    "gguf": [{Q: pf.LoRA(2, 3.0), V: pf.LoRA(3, 3.0), "embed_tokens": pf.LoRA(2, 3.0)}],
    "kohya": [
        {Q: pf.LoRA(2, alpha=3), K: pf.LoHa(2), V: pf.DoRA(2)},
        {Q: pf.InputDoRA(pf.LoRA(2)), K: pf.LoKr(2), V: pf.GLoRALycoris(2, alpha=3), GATE: pf.DiagOFT(4)},
        {Q: pf.LoKr(2, decompose_both=True), V: pf.IA3(), K: pf.IA3(feedforward=True), GATE: pf.Full()},
    ],
}


@cache
def good_files() -> dict[str, dict[str, bytes]]:
    """name → {file name: its bytes}, of every format and with every kind of entry a configuration may have."""
    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder))


def written(root: Path) -> dict[str, dict[str, bytes]]:
    lora = {"r": 2, "lora_alpha": 3}
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"0.*v_proj": 5}, **lora
        ),
        "dora": peft.LoraConfig(target_modules=r".*\.(q|k)_proj", use_dora=True, modules_to_save=["lm_head"], **lora),
        "embedding": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7], **lora),
        "layers": peft.LoraConfig(
            target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", exclude_modules=["x"], **lora
        ),
        "vera": peft.VeraConfig(target_modules=["q_proj"], r=3),
        "vblora": peft.VBLoRAConfig(
            target_modules=["q_proj"], r=2, num_vectors=6, vector_length=4, topk=3, save_only_topk_weights=True
        ),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "lokr": peft.LoKrConfig(target_modules=["q_proj"], r=2),
        "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
        "shira": peft.ShiraConfig(target_modules=["v_proj"], r=1, random_seed=3),
        "unilora": peft.UniLoraConfig(target_modules=["q_proj"], r=2, theta_d_length=9, save_indices=True),
        "tokens": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 7]),
        "poly": peft.PolyConfig(target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2, init_weights=False),
        "norms": peft.LNTuningConfig(target_modules=["norm"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=5),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True),
        "cartridge": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=1),
        "adaption": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
        "shadow": peft.ShadowConfig(task_type="CAUSAL_LM", r=2),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in configs.items():
            randomised(peft.get_peft_model(by_name["llama"].build(), config)).save_pretrained(root / f"peft {name}")
    rules = {
        "q_proj": pf.VeRA(3),
        r"\.1\..*v_proj": pf.LoRA(2),
        "v_proj": pf.chain(pf.LoRA(1), pf.IA3()),
        "k_proj": pf.VBLoRA(1, vectors=3, length=4),
        "o_proj": pf.SHiRA(rank=1),
        "gate_proj": pf.UniLoRA(rank=2, length=9),
        "up_proj": pf.OFT(block_size=4),
        "embed_tokens": pf.TrainableTokens((3, 7)),
    }
    net = pf.adapt(MODEL, rules)
    pf.save(root / "native", net, net.init(3))
    plain = pf.adapt(MODEL, {Q: pf.LoRA(2, 3.0), K: pf.VeRA(3), GATE: pf.Full()})
    pf.save(root / "native, served", plain, shaken(plain.init(3), 3))
    for format, rules in OTHERS.items():
        for i, methods in enumerate(rules):
            other = pf.adapt(MODEL, methods)
            end = ".gguf" if format == "gguf" else ""
            pf.save(root / f"{format} {i}{end}", other, shaken(other.init(3), 3), format=format)
    (root / PICKLED).mkdir()
    torch.save(load_file(root / "peft lora" / "adapter_model.safetensors"), root / PICKLED / "adapter_model.bin")
    (root / PICKLED / "adapter_config.json").write_text((root / "peft lora" / "adapter_config.json").read_text())
    mixture = pf.XLoRA(pf.adapt(MODEL, {Q: pf.LoRA(2)}), experts=2, depth=2, size=4, k=1)
    mixture.save(root / XLORA, shaken(mixture.init(3), 3))
    _by_others(root)
    out = {}
    for path in sorted(root.iterdir()):
        files = (
            [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".json", ".safetensors", ".bin")]
        )
        out[path.name] = {str(p.relative_to(root)): p.read_bytes() for p in files}
    return out


def _by_others(root: Path) -> None:
    """Folders of AdapterHub, of pyreft and of ms-swift's own tuners, which nothing here writes."""
    d, layer = MODEL.config.hidden_size, "model.layers.0"
    (root / PYREFT).mkdir()
    types = ["<class 'pyreft.interventions.NodireftIntervention'>"]
    (root / PYREFT / "config.json").write_text(json.dumps({"intervention_types": types}))
    parts = {"learned_source.weight": (2, d), "learned_source.bias": (2,), "proj_layer.weight": (2, d)}
    tensors = {k: torch.ones(shape) for k, shape in parts.items()}
    torch.save(tensors, root / PYREFT / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    for name, config, tensors in (
        (
            "adapterhub",
            {
                "config": {"architecture": "lora", "r": 2, "alpha": 4},
                "name": "task", "model_name": "own/er", "version": "adapters.1.3.0",
            },
            {
                f"{layer}.self_attn.q_proj.loras.task.lora_A": torch.ones(2, d),
                f"{layer}.self_attn.q_proj.loras.task.lora_B": torch.ones(d, 2),
            },
        ),
        (
            "swift adapter",
            {"swift_type": "ADAPTER"},
            {
                f"{layer}.mlp.adapter_default.{part}.{k}": torch.ones(shape)
                for part, (o, i) in {"linear1": (2, d), "linear2": (d, 2)}.items()
                for k, shape in {"weight": (o, i), "bias": (o,)}.items()
            },
        ),
    ):  # fmt: skip
        folder = root / name / ("default" if name.startswith("swift") else "")
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        file = "adapter_model.safetensors" if name.startswith("swift") else "adapter.safetensors"
        save_file(tensors, folder / file)


ENDS = (".json", ".safetensors", ".bin")
PICKLED, PYREFT, XLORA = "peft pickled", "pyreft", "xlora"
"""Folders that `pf.load` reads if it is told more, and a mixture of several adapters, which has a reader of its own."""


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 65, 10**6, 10**12, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "q_proj", "r", "LORA", "VERA", "OSF", "PROMPT_TUNING", "../../x", "/etc/passwd", "\0", "ä" * 300, "(a+)+b",
    "(a*){999999999}", ".*" * 100 + "x", "(", "(?P<a>.)(?P=a)", r"\d+", [], [[]], ["q_proj"], ["x", 3], [None], [1.5],
    {}, {"q_proj": 1}, {"q_proj": "a"}, {"a": {"b": {"c": []}}}, {"method": "LoRA", "rank": 10**12},
    {"(a*){999999999}": 2}, {"method": "VeRA"}, {"method": "Chain", "methods": []}, {"": 3},
]  # fmt: skip
NAMES = ["", "x", "/etc/passwd", "../../x", "a/b", "__metadata__", "base_model.", "lora_A.weight", "\0", "é" * 200]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def edited(value: Any, rng: random.Random, values: list[Any], names: list[str]) -> Any:
    """A JSON value with one thing in it changed."""
    *path, last = rng.choice(places(value)[1:] or [("",)])
    value = inside = json.loads(json.dumps(value))
    for k in path:
        inside = inside[k]
    match rng.choice(["set", "set", "set", "remove", "rename", "swap", "add"]):
        case "set":
            inside[last] = rng.choice(values)
        case "remove":
            del inside[last]
        case "rename" if isinstance(inside, dict):
            inside[rng.choice([*names, *inside])] = inside.pop(last)
        case "swap" if isinstance(inside, dict):
            other = rng.choice(sorted(inside))
            inside[last], inside[other] = inside[other], inside[last]
        case _ if isinstance(inside, dict):
            inside[rng.choice(names)] = rng.choice(values)
        case _:
            inside.append(rng.choice(values))
    return value


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(KINDS)
    where = rng.randrange(max(1, len(content)))
    if name.endswith(".json") and kind in ("json", "header", "values"):
        text = json.dumps(
            edited(json.loads(content), rng, VALUES, [*NAMES, "r", "use_dora", "bias", "init_lora_weights"])
        )
        if rng.random() < 0.1:  # a key twice
            text = '{"peft_type": "IA3", "version": 1, ' + text[1:]
        return text.encode("utf-8", "surrogatepass")
    if kind == "cut":
        return content[:where] if rng.random() < 0.5 else content + content[where:]
    if kind == "flip" or not name.endswith(".safetensors"):
        out = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(rng.choice([len(content), min(len(content), 400)]))] = rng.randrange(256)
        return bytes(out)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if kind == "values":
        if not data:
            return content
        at = rng.randrange(len(data) // 4) * 4
        number = rng.choice([float("nan"), float("inf"), -1.0, 1e3, 0.0])
        return content[: 8 + size] + data[:at] + struct.pack("<f", number) + data[at + 4 :]
    edges: list[Any] = [
        0,
        1,
        -1,
        2,
        10**12,
        2**63,
        [],
        [10**12],
        [2**31, 2**33],
        [0],
        [1, 1, 1],
        "F64",
        "F16",
        "I64",
        "BOOL",
        "X",
        None,
        "",
        len(data),
    ]
    if rng.random() < 0.1:  # the same name twice
        twice = rng.choice(sorted(header))
        text = "{" + json.dumps(twice) + ":" + json.dumps(header[twice]) + "," + json.dumps(header)[1:]
    else:
        text = json.dumps(edited(header, rng, edges, [*NAMES, *header]))
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    length = rng.choice([len(raw)] * 9 + [2**62])
    return struct.pack("<Q", length) + raw + data
