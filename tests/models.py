"""Tiny random models of every shape a user may bring, built offline. `CASES` is what the model tests run over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
VOCAB, LENGTH = 24, 5
SMALL = {"vocab_size": VOCAB, "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """One model: how to build it, call it and read it, and which of its sites are linear-like.

    linear: a rule for linear-like sites. mixed: those sites keep the rows of a batch in the first dimension.
    vmap: the forward has no data-dependent control flow. generate: it is a language model with `generate`.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    linear: str
    output: Callable[[Any], Tensor] = field(default=lambda y: y)
    mixed: bool = True
    vmap: bool = True
    generate: bool = False

    def build(self) -> nn.Module:
        """A new model with the same random weights every time, in eval mode, nothing in it zero or one."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.dim() == 1 and p.mean() > 0.5 else 0.0))
        return model

    def __str__(self) -> str:
        return self.name


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int = LENGTH, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def ids(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (tokens(batch),), {"use_cache": False}


def floats(*shape: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda batch: ((noise(batch, *shape),), {})


def logits(y: Any) -> Tensor:
    return y.logits


def llama(**options: Any) -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **c, num_key_value_heads=1, **options))


def gpt2() -> nn.Module:
    zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16, **zero))


def bert() -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    c |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    return tf.BertModel(tf.BertConfig(**SMALL, **c))


def t5() -> nn.Module:
    c = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**SMALL, **c, decoder_start_token_id=0))


def mixtral() -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    c |= {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, **c))


def gpt_oss() -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    c |= {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, **c))


def gemma3() -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, **c, num_key_value_heads=1, head_dim=8, sliding_window=4))


def whisper() -> nn.Module:
    c = {"num_mel_bins": 6, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    c |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0}
    c |= {"max_source_positions": 8, "max_target_positions": 8, "decoder_start_token_id": 1}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SMALL, **c))


def vit() -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    c |= {"image_size": 8, "patch_size": 4, "num_labels": 5, "attn_implementation": "eager"}
    return tf.ViTForImageClassification(tf.ViTConfig(**c))


class Tied(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(ids))))


class Shared(nn.Module):
    """One submodule under two names, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second, self.norm = self.first, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Convs(nn.Module):
    """Convolutions of 1, 2 and 3 dimensions with every option, and BatchNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.bn1 = nn.BatchNorm1d(6)
        self.two = nn.Conv2d(6, 4, (3, 2), padding="same", groups=2, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(1, 2), padding_mode="replicate", bias=False)
        self.three = nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0))
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [b, 4, 12]
        x = torch.tanh(self.bn1(self.one(x))).unflatten(-1, (2, -1))
        x = self.wide(torch.tanh(self.bn2(self.two(x))))
        x = torch.tanh(self.three(x.unflatten(1, (2, 2))))
        return self.up(x.mean(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.cell = nn.GRU(12, 4, batch_first=True), nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gru(self.lstm(x)[0])[0]
        return self.cell(y[:, 0], y[:, -1])


class Attention(nn.Module):
    """nn.MultiheadAttention, packed and with separate key and value widths, and a layer with a fused eval path."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.packed(x, x, x, need_weights=False)[0]
        return self.layer(y + self.apart(y, y[..., :4], y[..., 2:])[0])


class Functions(nn.Module):
    """Parameters in every other use: stacks, bilinear, einsum, products, indices, norms of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.mask = nn.Bilinear(8, 8, 8), nn.Parameter(torch.zeros(8))
        self.w, self.stack = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(3, 8, 8))
        self.bag = nn.EmbeddingBag(8, 8, mode="mean")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bilinear(x, x) + torch.einsum("...i,ji->...j", x, self.w) + F.linear(x, F.normalize(self.w))
        y = (
            y
            + x @ self.w.T
            + self.w[0] * x
            - x.unsqueeze(-1).mul(self.w).sum(1)
            + self.w[2:4].mean(0)
            + self.stack[1, 0] * self.mask
        )
        y = y + sum(F.linear(torch.sigmoid(x), self.stack[e]) for e in range(3)) + self.w.norm() * self.mask.exp()
        return y + self.bag((x[:, :2] > 0).long())


def whisper_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_features": noise(batch, 6, 16), "decoder_input_ids": tokens(batch, 4), "use_cache": False}


def t5_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": tokens(batch), "decoder_input_ids": tokens(batch, 4), "use_cache": False}


QKVO = r"(q|k|v|o)_proj\.weight"
CASES = [
    Case("llama", llama, ids, QKVO, logits, generate=True),
    Case("gpt2", gpt2, ids, r"(c_attn|c_fc|c_proj)\.weight", logits, generate=True),
    Case("bert", bert, lambda b: ((tokens(b),), {}), r"(query|value|dense)\.weight", lambda y: y.last_hidden_state),
    Case("t5", t5, t5_inputs, r"\.(q|v|wi|wo)\.weight", logits, generate=True),
    Case("mixtral", mixtral, ids, r"experts\.(gate_up|down)_proj", logits, mixed=False, vmap=False),
    Case("gpt_oss", gpt_oss, ids, r"experts\.(gate_up|down)_proj$", logits, mixed=False, vmap=False),
    Case("gemma3", gemma3, ids, QKVO, logits),
    Case("whisper", whisper, whisper_inputs, r"(q_proj|fc1|conv1|conv2)\.weight", logits),
    Case("vit", vit, floats(3, 8, 8), r"(attention.*|patch_embeddings.*|dense)\.weight", logits),
    Case("mlp", lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), floats(8), r"weight"),
    Case("tied", Tied, lambda b: ((tokens(b),), {}), r"(embed|mid)\.weight"),
    Case("shared", Shared, floats(8), "first"),
    Case("convs", Convs, floats(4, 12), r"(one|two|wide|three|up)\.weight"),
    Case("recurrent", Recurrent, floats(5, 4), r"(lstm|gru|cell)\.weight_", mixed=False, vmap=False),
    Case("attention", Attention, floats(5, 8), r"(proj_weight|out_proj\.weight|linear\d\.weight)", mixed=False),
    Case("functions", Functions, floats(8), r"(^w|stack)$", mixed=False),
]
by_name = {case.name: case for case in CASES}


class Made(TorchDispatchMode):
    """Counts tensors of some size that have storage, as they are made."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(out):
            new = isinstance(t, Tensor) and not t.is_meta and t.untyped_storage().data_ptr() not in old
            if new and t.numel() >= self.size:
                self.seen.append(f"{func} made {list(t.shape)}")
        return out
