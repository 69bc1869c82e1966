"""The names of a model's layers and of a method's tensors in kohya's and diffusers' files."""

import re
from collections.abc import Iterator

from peftfn.core.method import Weight
from peftfn.formats.kohya_flux import first_name
from peftfn.formats.kohya_unet import older
from peftfn.methods.weights.diag_oft import DiagOFT
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.glora_lycoris import GLoRALycoris
from peftfn.methods.weights.ia3 import IA3
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.model.site import Site

FLAT: dict[str, tuple[str, ...]] = {
    "lora_unet": ("unet", "transformer"),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lora_transformer": ("transformer", "unet"),
    "lycoris": (),
}
"""kohya's prefixes → the part of a pipeline they mean; where the model has no such part, they mean the model."""
DOTTED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model")
"""diffusers' prefixes; where the model has no such part, they mean the model."""

Key = tuple[type[Weight] | None, str]
ENDS: dict[str, Key] = {
    **dict.fromkeys(("lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_B.weight"), (LoRA, "b")),
    **dict.fromkeys(
        ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_A.weight"), (LoRA, "a")
    ),
    "up.weight": (LoRA, "b"),
    "down.weight": (LoRA, "a"),
    "lora_mid.weight": (LoRA, "mid"),
    "lora_B.bias": (LoRA, "beta"),
    **{key: (LoHa, k) for k, key in LoHa.peft.keys.items()},
    **{key: (LoKr, k) for k, key in LoKr.peft.keys.items()},
    **{f"{k}.weight": (GLoRALycoris, k) for k in ("a1", "a2", "b1", "b2")},
    "oft_blocks": (DiagOFT, "b"),
    "rescale": (DiagOFT, "s"),
    "weight": (IA3, "l"),
    "on_input": (IA3, "on_input"),
    **dict.fromkeys(("diff", "w_norm"), (Full, "weight")),
    **dict.fromkeys(("diff_b", "b_norm"), (Full, "bias")),
    "alpha": (None, "alpha"),
    "dora_scale": (None, "m"),
    "lora_magnitude_vector": (None, "m"),
}
"""The end of a key → the method it belongs to (None: any), and the tensor's name in that method's leaf."""

_NAMED = re.compile(r"(.*\.(?:lora_[AB]|lora_magnitude_vector))\.([^.]+)(\.(?:weight|bias))?")


def nameless(key: str) -> str:
    """A key without the name of PEFT's adapter, which some files have in it: `lora_A.default.weight`."""
    m = _NAMED.fullmatch(key)
    if m is None or (m[2] in ("weight", "bias") and not m[1].endswith("vector")):
        return key
    return m[1] if m[1].endswith("vector") else f"{m[1]}{m[3] or ''}"


class Names:
    """The names of a model's layers in files."""

    def __init__(self, model: Model):
        self.parts = [n for n, _ in model.root.named_children()]
        self.sites: dict[tuple[str, str], Site] = {}  # (module, "weight" or "bias")
        self.meant: dict[str, set[str]] = {}  # a file's name → modules
        real: dict[str, str] = {}  # every name of a module → its first
        for site in model.sites.values():
            for name in (site.name, *site.aliases):
                module, _, attr = name.rpartition(".")
                if attr in ("weight", "bias"):
                    self.sites.setdefault((site.module, attr), site)
                    real[module] = site.module
        texts = ("", *(p for p in self.parts if p.startswith("text_encoder")))
        roots = {f"{p}." if p else "": {n for n, _ in model.modules[p].named_children()} for p in texts}
        self.short = [p for p, names in roots.items() if names >= {"embeddings", "encoder", "final_layer_norm"}]
        self.unet = {path for m in real if (path := self.inside("lora_unet", m)) is not None}
        self.flux = {"transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.proj_mlp"} <= self.unet
        self.fused: dict[str, dict[int, str]] = {}  # a file's name of several modules in one → the modules in order
        for module, first in real.items():
            for spelling in self.spellings(module):
                self.meant.setdefault(spelling, set()).add(first)
            for spelling, part in self.flux_names(module):
                if part is None:
                    self.meant.setdefault(spelling, set()).add(first)
                else:
                    self.fused.setdefault(spelling, {})[part] = first

    def spellings(self, module: str) -> Iterator[str]:
        """Every name that a file may have for a module."""
        for name in (module, *self.longer(module), *_processor(module)):
            yield name
            yield from (f"{p}.{name}" for p in DOTTED if p not in self.parts)
        for prefix in FLAT:
            if (path := self.inside(prefix, module)) is not None:
                yield f"{prefix}_{path}".replace(".", "_")
                for name in self.longer(module):
                    yield f"{prefix}_{self.inside(prefix, name)}".replace(".", "_")
                if prefix == "lora_unet" and (old := older(path, self.unet)) is not None:
                    yield f"{prefix}_{old}".replace(".", "_")
                    yield f"diffusion_model.{old}"

    def flux_names(self, module: str) -> Iterator[tuple[str, int | None]]:
        """The names of Flux's first implementation for a module, and which part of that layer it is."""
        path = self.inside("lora_unet", module) if self.flux else None
        if path is None or (found := first_name(path)) is None:
            return
        name, part = found
        for spelling in (f"lora_unet_{name}".replace(".", "_"), name, *(f"{p}.{name}" for p in DOTTED)):
            yield spelling, part

    def longer(self, module: str) -> list[str]:
        """The module's name in transformers 4, where CLIP's text model has a `text_model` in it, as it has in files."""
        return [f"{p}text_model.{module.removeprefix(p)}" for p in self.short if module.startswith(p)]

    def inside(self, prefix: str, module: str) -> str | None:
        """The module's path inside the part that a prefix of kohya's means; None if it is in another part."""
        part = next((p for p in FLAT[prefix] if p in self.parts), None)
        if part is None:
            return module
        return module.removeprefix(f"{part}.") if module.startswith(f"{part}.") else None

    def find(self, name: str, where: object) -> str | None:
        """The module of a name, or None. ValueError where a name means several."""
        found = sorted(self.meant.get(name, ()))
        if len(found) > 1:
            raise ValueError(
                f"{where}: {name} may be {' or '.join(found)}: names with underscores do not distinguish them. Use "
                "diffusers' layout, which has dots, or rename one with key_mapping."
            )
        return found[0] if found else None

    def written(self, module: str, layout: str, prefix: str | None) -> str:
        if layout == "diffusers":
            part = module.partition(".")[0]
            if (prefix or part).startswith("text_encoder"):
                module = next(iter(self.longer(module)), module)
            return module if prefix is None and part in DOTTED else f"{prefix or 'unet'}.{module}"
        if prefix is None:
            several = "text_encoder_2" in self.parts
            mine = [p for p in FLAT if module.partition(".")[0] in FLAT[p] and (p != "lora_te" or not several)]
            prefix = mine[0] if mine else "lora_unet"
        if (path := self.inside(prefix, module)) is None:
            raise ValueError(f"{module}: no part of a pipeline that {prefix} names has it; give another prefix=")
        if prefix.startswith("lora_te"):
            path = next((p for n in self.longer(module) if (p := self.inside(prefix, n))), path)
        return f"{prefix}_{path}".replace(".", "_")


def _processor(module: str) -> list[str]:
    """What diffusers' first LoRA files call a layer of an attention: `….processor.to_q_lora`."""
    name = module.removesuffix(".0")
    parent, _, last = name.rpartition(".")
    return [f"{parent}.processor.{last}_lora"] if last in ("to_q", "to_k", "to_v", "to_out") and parent else []
