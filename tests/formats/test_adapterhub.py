"""AdapterHub's and pyreft's folders, made by hand as the two packages write them; the references are their formulas."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from support import small_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf

D, R = 16, 4
IDS = torch.randint(3, 32, (2, 7), generator=torch.Generator().manual_seed(0))
SEQ = {"original_ln_before": True, "non_linearity": "relu", "residual_before_ln": True, "output_adapter": True}
DOUBLE = {"original_ln_before": False, "non_linearity": "swish", "mh_adapter": True, "scaling": 2.0}


@cache
def base(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt2":
            return tf.GPT2Model(small_gpt2(2)).eval()
        sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
        bert = tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3)
        bert.initializer_range = 0.3
        return tf.BertForSequenceClassification(bert).eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], safe: bool = False, **more: Any) -> Path:
    path.mkdir(exist_ok=True)
    whole = {"config": config, "name": "task", "model_type": "bert", "version": "adapters.1.3.0", **more}
    (path / "adapter_config.json").write_text(json.dumps(whole))
    if safe:
        save_file(tensors, path / "adapter.safetensors")
    else:
        torch.save(tensors, path / "pytorch_adapter.bin")
    return path


def bottleneck(at: str, seed: int) -> dict[str, Tensor]:
    sizes = {"adapter_down.0.weight": (R, D), "adapter_down.0.bias": (R,)}
    sizes |= {"adapter_up.weight": (D, R), "adapter_up.bias": (D,)}
    return {f"{at}.adapters.task.{k}": draw(*s, seed=seed) for k, s in sizes.items()}


def change(t: dict[str, Tensor], at: str, h: Tensor, act: Any, scale: float = 1.0) -> Tensor:
    d, c, u, b = (
        t[f"{at}.adapters.task.{k}"]
        for k in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    )
    return scale * F.linear(act(F.linear(h, d, c)), u, b)


def hooked(model: nn.Module, hooks: dict[str, Any]) -> Tensor:
    handles = [model.get_submodule(n).register_forward_hook(f) for n, f in hooks.items()]
    out = model(IDS)
    for handle in handles:
        handle.remove()
    return out[0]  # type: ignore[no-any-return]


def same(got: Any, want: Tensor, plain: Any) -> None:
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
    assert (want - plain[0]).abs().max() > 1e-2


PLACES = {
    "bert": [f"bert.encoder.layer.{i}.output" for i in range(2)],
    "gpt2": [f"h.{i}.output_adapters" for i in range(2)],
}


@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn", "legacy"])
def test_bottlenecks_in_bert(kind: str, tmp_path: Path) -> None:
    model, config, act = base("bert"), dict(DOUBLE if kind == "double_seq_bn" else SEQ), F.relu
    ats = list(PLACES["bert"])
    scale = config.get("scaling", 1.0)
    if kind == "double_seq_bn":
        ats += [f"bert.encoder.layer.{i}.attention.output" for i in range(2)]
        act = F.silu
    t: dict[str, Tensor] = {}
    for i, at in enumerate(ats):
        t |= bottleneck(at, i)

    def normed(at: str) -> Any:
        def hook(m: Any, args: Any, y: Tensor) -> Tensor:
            h, residual = m.dense(args[0]), args[1]
            x = m.LayerNorm(h + residual) if kind != "double_seq_bn" else h
            return m.LayerNorm(h + change(t, at, x, act, scale) + residual)

        return hook

    want = hooked(model, {at: normed(at) for at in ats})
    more: dict[str, Any] = {}
    saved = t
    if kind == "legacy":  # as before `adapters`: other names, no version, and a base without its prefix
        saved = {k.removeprefix("bert.").replace(".adapters.", ".layer_text_task_adapters."): v for k, v in t.items()}
        more = {"version": "2.1.0"}
    net, a = pf.load(folder(tmp_path / "f", config, saved, **more), model, pickled=True)
    same(net.apply(a, IDS), want, model(IDS))


def test_pfeiffer_in_gpt2_is_on_what_a_block_returns(tmp_path: Path) -> None:
    model, t = base("gpt2"), {}
    for i, at in enumerate(PLACES["gpt2"]):
        t |= bottleneck(at, i)

    def after(at: str) -> Any:
        def hook(m: Any, args: Any, out: Any) -> Any:
            y = out if isinstance(out, Tensor) else out[0]
            new = y + change(t, at, y, F.relu)
            return new if isinstance(out, Tensor) else (new, *out[1:])

        return hook

    want = hooked(model, {at.rpartition(".")[0]: after(at) for at in PLACES["gpt2"]})
    net, a = pf.load(folder(tmp_path / "f", SEQ, t, safe=True), model)
    same(net.apply(a, IDS), want, model(IDS))


def test_lora_and_a_head(tmp_path: Path) -> None:
    model = base("bert")
    at = "bert.encoder.layer.1.attention.self.query"
    t = {f"{at}.loras.task.lora_A": draw(2, D), f"{at}.loras.task.lora_B": draw(D, 2)}
    head = {"classifier.weight": draw(3, D), "classifier.bias": draw(3)}
    config = {"architecture": "lora", "r": 2, "alpha": 6, "composition_mode": "add"}
    path = folder(tmp_path / "f", config, t)
    torch.save(head, path / "pytorch_model_head.bin")
    net, a = pf.load(path, model, pickled=True)
    merged = net.merge(a)
    want = model.get_parameter(f"{at}.weight") + 3 * t[f"{at}.loras.task.lora_B"] @ t[f"{at}.loras.task.lora_A"]
    torch.testing.assert_close(merged[f"{at}.weight"], want)
    torch.testing.assert_close(merged["classifier.bias"], head["classifier.bias"])
    folder(path, config, t, version="adapters.1.0.0")  # whose scaling was 1
    net, a = pf.load(path, model, pickled=True)
    assert net.plan[f"{at}.weight"].method == pf.LoRA(rank=2, alpha=2)


def rotation(seed: int = 0) -> dict[str, Tensor]:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(D, 2, bias=False))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["parametrizations.weight.original"] += draw(2, D, seed=seed).triu(1)
    return state


@pytest.mark.parametrize("name", ["LoReFT", "NoReFT", "DiReFT"])
def test_reft(name: str, tmp_path: Path) -> None:
    model, t, rows, free = base("gpt2"), {}, [], name != "LoReFT"
    for unit in range(2):
        state = {"weight": draw(2, D, seed=unit)} if free else rotation(unit)
        layer = nn.Linear(D, 2, bias=False)
        layer = layer if free else nn.utils.parametrizations.orthogonal(layer)
        layer.load_state_dict(state)
        rows.append(layer.weight.detach().clone())
        at = f"h.1.reft_layer.refts.task.units.{unit}"
        t |= {f"{at}.projection.{k}": v for k, v in state.items()}
        t |= {f"{at}.learned_source.weight": draw(2, D, seed=5 + unit), f"{at}.learned_source.bias": draw(2, seed=unit)}

    def hook(m: Any, args: Any, out: Any) -> Any:
        y = (out if isinstance(out, Tensor) else out[0]).clone()
        for unit, at in enumerate((slice(0, 2), slice(-1, None))):
            h, p = y[:, at], rows[unit]
            k = f"h.1.reft_layer.refts.task.units.{unit}.learned_source"
            source = F.linear(h, t[f"{k}.weight"], t[f"{k}.bias"])
            y[:, at] = h + (source if name == "DiReFT" else source - F.linear(h, p)) @ p
        return y if isinstance(out, Tensor) else (y, *out[1:])

    want = hooked(model, {"h.1": hook})
    config = {"architecture": "reft", "prefix_positions": 2, "suffix_positions": 1, "r": 2, "orthogonality": not free}
    path = folder(tmp_path / "f", config, t)
    if free:  # the package writes the two alike
        with pytest.raises(ValueError, match=r"method=pf.NoReFT\(\)\) or load\(…, method=pf.DiReFT\(\)\)"):
            pf.load(path, model, pickled=True)
        with pytest.raises(ValueError, match=r"it is of NoReFT or DiReFT\. Say which"):
            pf.load(path, model, pickled=True, method=pf.LoReFT())
    net, a = pf.load(path, model, pickled=True, method=getattr(pf, name)() if free else None)
    same(net.apply(a, IDS), want, model(IDS))


def test_a_method_is_for_a_reft(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", SEQ, bottleneck(PLACES["bert"][0], 0))
    with pytest.raises(ValueError, match=r"method= says which ReFT a file has, .*leave it out"):
        pf.load(path, base("bert"), pickled=True, method=pf.DiReFT())


@pytest.mark.parametrize(
    ("change_", "message"),
    [
        ({"phm_layer": True}, "the adapter at .* has .*; this release reads"),
        ({"use_gating": True}, "use_gating is True"),
        ({"non_linearity": "mish"}, "non_linearity is 'mish'"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
        ({"scaling": "learned"}, "scaling is 'learned'"),
    ],
    ids=str,
)
def test_refuses_what_means_something_else(change_: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "f", {**SEQ, **change_}, bottleneck(PLACES["bert"][0], 0))
    with pytest.raises(ValueError, match=message):
        pf.load(path, base("bert"), pickled=True)


def test_refuses_pickles_other_tensors_and_other_models(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", SEQ, bottleneck(PLACES["bert"][0], 0))
    with pytest.raises(ValueError, match=r"pytorch_adapter.bin is a pickle: load\(…, pickled=True\)"):
        pf.load(path, base("bert"))
    with pytest.raises(ValueError, match=r"the model has 0 modules at bert.encoder.layer.0.output"):
        pf.load(path, base("gpt2"), pickled=True)
    torch.save({"heads.task.1.weight": draw(3, D)}, path / "pytorch_model_head.bin")
    with pytest.raises(ValueError, match=r"'heads.task.1.weight'"):
        pf.load(path, base("bert"), pickled=True)
    assert pf.load(path, base("bert"), pickled=True, strict=False).unexpected == ("heads.task.1.weight",)
    with pytest.raises(ValueError, match="is read, not written"):
        pf.save(tmp_path / "g", *pf.load(path, base("bert"), pickled=True, strict=False), format="adapterhub")


# pyreft.

METHODS = {
    "Loreft": pf.LoReFT(first=2, last=1, tied=False),
    "Noreft": pf.NoReFT(first=2, last=1, tied=False),
    "Direft": pf.DiReFT(first=2, last=1, tied=False),
    "Nodireft": pf.DiReFT(first=2, last=1, tied=False),
    "Consreft": pf.ConsReFT(first=2, last=1, tied=False),
    "Lobireft": pf.LobiReFT(first=2, last=1, tied=False),
}


def intervention(name: str, seed: int) -> tuple[dict[str, Tensor], Any]:
    """(what pyreft saves, h ↦ what it makes of h)."""
    w, b, p = draw(2, D, seed=seed), draw(2, seed=seed), draw(2, D, seed=seed + 9)
    source = {"learned_source.weight": w, "learned_source.bias": b}
    if name in ("Noreft", "Nodireft"):
        free = {**source, "proj_layer.weight": p}
        return free, lambda h: h + (F.linear(h, w, b) - (F.linear(h, p) if name == "Noreft" else 0)) @ p
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.linalg.qr(p.mT)[0])
    holder = nn.utils.parametrizations.orthogonal(holder)
    r = holder.weight.detach().clone()  # [d, rank], orthonormal columns
    kept = {f"rotate_layer.{k}": v for k, v in holder.state_dict().items()}
    if name == "Loreft":
        return {"weight": w, "bias": b, "rotate_layer": r}, lambda h: h + (F.linear(h, w, b) - h @ r) @ r.mT
    if name == "Direft":
        return {**source, **kept}, lambda h: h + F.linear(h, w, b) @ r.mT
    if name == "Consreft":
        return {"learned_source": b, **kept}, lambda h: h + (b - h @ r) @ r.mT
    return {"learned_source": b, **kept}, lambda h: h + b @ r.mT


@pytest.mark.parametrize("name", METHODS)
def test_pyreft(name: str, tmp_path: Path) -> None:
    model, made = base("gpt2"), []
    for number in range(2):
        saved, f = intervention(name, number)
        made.append(f)
        torch.save(saved, tmp_path / f"intkey_layer_1_comp_block_output_unit_pos_nunit_1#{number}.bin")
    types = [f"<class 'pyreft.interventions.{name}Intervention'>"] * 2
    (tmp_path / "config.json").write_text(json.dumps({"intervention_types": types, "mode": "parallel"}))

    def hook(m: Any, args: Any, out: Any) -> Any:
        y = (out if isinstance(out, Tensor) else out[0]).clone()
        for f, at in zip(made, (slice(0, 2), slice(-1, None)), strict=True):
            y[:, at] = f(y[:, at])
        return y if isinstance(out, Tensor) else (y, *out[1:])

    want = hooked(model, {"h.1": hook})
    net, a = pf.load(tmp_path, model, method=METHODS[name], pickled=True)
    same(net.apply(a, IDS), want, model(IDS))


def test_pyreft_asks_for_positions(tmp_path: Path) -> None:
    torch.save(intervention("Loreft", 0)[0], tmp_path / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"intervention_types": ["pyreft.interventions.LoreftIntervention"]})
    )
    with pytest.raises(ValueError, match=r"load\(…, method=pf.LoReFT\(first=1, last=1\)\)"):
        pf.load(tmp_path, base("gpt2"), pickled=True)
    with pytest.raises(ValueError, match="has pickles"):
        pf.load(tmp_path, base("gpt2"), method=pf.LoReFT(first=1, last=1))
    with pytest.raises(ValueError, match=r"h.1 has 1 interventions, and .* has 2"):
        pf.load(tmp_path, base("gpt2"), method=METHODS["Loreft"], pickled=True)
