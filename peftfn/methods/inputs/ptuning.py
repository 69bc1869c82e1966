"""P-tuning: virtual tokens that an MLP or an LSTM makes of trained inputs."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, positive_int, rounds
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Tokens
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class PTuning(Tokens):
    """cat[f(X), E(ids)] in place of E(ids), X [n, d] trained, and so is f: an MLP of three layers, or a bidirectional
    LSTM and an MLP of two. `net.prepare` computes f(X) once; PEFT's files hold nothing else.

    Liu et al., "GPT Understands, Too", 2021, arXiv:2103.10385.

    Trainable parameters per site: n·d and those of f, about 2·d·hidden + hidden² for an MLP. Use it where prompt tuning
    trains slowly; at the end the cost is that of a prompt.

    Args:
        n: virtual tokens.
        encoder: what f is.
        hidden: f's width; None is d.
        layers: of the LSTM.
        pooled: as for `PromptTuning`.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.PTuning(n=3)})
        prompt = net.prepare(net.init(seed=0))["model"]["tokens"]
    """

    cases: ClassVar[Cases] = ({"n": 3, "hidden": 4}, {"n": 2, "encoder": "LSTM", "hidden": 3})

    n: PositiveInt = 8
    encoder: Literal["MLP", "LSTM"] = "MLP"
    hidden: PositiveInt | None = None
    layers: Annotated[int, positive_int, rounds] = 2
    pooled: Literal["token", "virtual"] = "token"

    identity = False  # type: ignore[assignment]

    def init(self, rng: Rng, m: Place) -> Leaf:
        d, h = m.width, self.hidden or m.width
        leaf = {"inputs": rng.normal(self.n, d)}
        sizes = [(h, d), (h, h), (d, h)] if self.encoder == "MLP" else [(2 * h, 2 * h), (d, 2 * h)]
        for i, (out, in_) in enumerate(sizes):
            leaf |= {f"w{i}": rng.kaiming(out, in_), f"b{i}": rng.uniform(out, bound=in_**-0.5)}
        for k in self._directions() if self.encoder == "LSTM" else ():
            in_ = d if k.startswith("0") else 2 * h
            shapes = {"ih": (4 * h, in_), "hh": (4 * h, h), "bih": (4 * h,), "bhh": (4 * h,)}
            leaf |= {f"{name}_{k}": rng.uniform(*shape, bound=h**-0.5) for name, shape in shapes.items()}
        return leaf

    def _directions(self) -> list[str]:
        return [f"{layer}{side}" for layer in range(self.layers) for side in ("", "r")]

    def tokens(self, p: Leaf, m: Place) -> Tensor:
        x, count = p["inputs"], 3 if self.encoder == "MLP" else 2
        if self.encoder == "LSTM":
            for layer in range(self.layers):
                x = torch.cat([_lstm(p, f"{layer}", x), _lstm(p, f"{layer}r", x.flip(0)).flip(0)], -1)
        for i in range(count):
            x = F.linear(x.relu() if i else x, p[f"w{i}"], p[f"b{i}"])
        return x


def _lstm(p: Leaf, k: str, x: Tensor) -> Tensor:
    """One direction of a layer, x [n, in] ↦ [n, hidden]; step by step, since torch's own has no rule for vmap."""
    z = F.linear(x, p[f"ih_{k}"], p[f"bih_{k}"] + p[f"bhh_{k}"])
    h = c = torch.zeros_like(p[f"hh_{k}"][0])
    out = []
    for step in z.unbind(0):
        i, f, g, o = (step + p[f"hh_{k}"] @ h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out)
