"""What is built by hand, and what some configurations need by hand."""

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from .inputs import ROWS, Inputs, ids, noise


@dataclass(frozen=True)
class Made:
    """A model and its inputs. rows: the batch is the first dimension of the inputs, or `cut` takes a row of them."""

    model: nn.Module
    inputs: Inputs
    cut: Callable[[Inputs, int], Inputs] | None = None
    rows: bool = True
    generates: bool = True


MADE: dict[str, Callable[[], Made]] = {}
"""Kind → what makes it: models that no single configuration of transformers describes."""
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "vocab_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2, **WIDE}
CLIP = {
    **{"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
    **{"projection_dim": 16, **WIDE},
}
IMAGE = 90  # the token that stands for a piece of an image


def made(f: Callable[[], Made]) -> Callable[[], Made]:
    MADE[f.__name__] = f
    return f


# torch


@made
def torch_transformer() -> Made:
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    return Made(model, {"src": noise(ROWS, 7, 32), "tgt": noise(ROWS, 6, 32, seed=1)})


@made
def torch_transformer_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return Made(nn.TransformerEncoder(layer, 2), {"src": noise(ROWS, 7, 32)})


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase]):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(48, 8)
        self.rnn = cls(16, 24, 2, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


@made
def torch_lstm() -> Made:
    return Made(Recurrent(nn.LSTM), {"ids": ids(vocab=32)})


@made
def torch_gru() -> Made:
    return Made(Recurrent(nn.GRU), {"ids": ids(vocab=32)})


class Reused(nn.Module):
    """One block in three places under two names, and a head that is the embedding: sites that share modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.first = self.second = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(self.first(self.second(self.first(h)) + h))


@made
def torch_shared_layers() -> Made:
    return Made(Reused(), {"ids": ids(vocab=32)})


# transformers: several parts, or inputs that cannot be guessed


def _language_and_pictures(model: Any, pieces: int, **more: Any) -> Made:
    """Five rows of text with `pieces` image tokens in each, and a picture for each."""
    model.generation_config.pad_token_id = 0
    text = torch.cat([ids(2), torch.full((ROWS, pieces), IMAGE), ids(4, seed=1)], 1)
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": noise(ROWS, 3, 32, 32)}
    return Made(_lively(model), inputs | more)


def _lively(model: Any) -> Any:
    from .build import lively_  # which imports this module's table

    return lively_(model.eval())


@made
def llava_pixels() -> Made:
    config = tf.LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_id=IMAGE)
    return _language_and_pictures(tf.LlavaForConditionalGeneration(config), 16)


@made
def vipllava_pixels() -> Made:
    config = tf.VipLlavaConfig(
        vision_config=CLIP, text_config=LLAMA, image_token_id=IMAGE, vision_feature_layers=[-2, -1]
    )
    return _language_and_pictures(tf.VipLlavaForConditionalGeneration(config), 16)


@made
def llava_next_pixels() -> Made:
    config = tf.LlavaNextConfig(
        vision_config=CLIP, text_config=LLAMA, image_token_id=IMAGE, image_grid_pinpoints=[[32, 32]]
    )
    sizes, tiles = torch.tensor([[32, 32]] * ROWS), noise(ROWS, 2, 3, 32, 32)
    model = tf.LlavaNextForConditionalGeneration(config)
    return _language_and_pictures(model, 36, image_sizes=sizes, pixel_values=tiles)


@made
def gemma3_pixels() -> Made:
    kinds = ["sliding_attention", "full_attention"]
    config = tf.Gemma3Config(
        text_config={**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "layer_types": kinds},
        vision_config={"num_hidden_layers": 2, "image_size": 32, "patch_size": 8, **WIDE},
        **{"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 91, "eoi_token_index": 92},
    )
    out = _language_and_pictures(tf.Gemma3ForConditionalGeneration(config), 4)
    out.inputs["token_type_ids"] = (out.inputs["input_ids"] == IMAGE).long()
    return out


@made
def mistral3_pixels() -> Made:
    config = tf.Mistral3Config(
        vision_config={
            **{"model_type": "pixtral", "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "head_dim": 8},
            **WIDE,
        },
        text_config={**LLAMA, "model_type": "mistral", "head_dim": 8},
        **{"image_token_id": IMAGE, "spatial_merge_size": 2},
    )
    sizes = torch.tensor([[32, 32]] * ROWS)
    return _language_and_pictures(tf.Mistral3ForConditionalGeneration(config), 4, image_sizes=sizes)


@made
def bark_semantic() -> Made:
    return Made(_lively(tf.BarkSemanticModel(tf.BarkSemanticConfig(**_bark()))), {"input_ids": ids()}, generates=False)


@made
def bark_fine() -> Made:
    model = _lively(tf.BarkFineModel(tf.BarkFineConfig(**_bark(), n_codes_total=4)))
    codes = torch.stack([ids(seed=s) for s in range(4)], -1)
    return Made(model, {"codebook_idx": 2, "input_ids": codes}, generates=False)


def _bark() -> dict[str, Any]:
    sizes = {"block_size": 64, "num_layers": 2, "num_heads": 4, "hidden_size": 32}
    return {**sizes, "input_vocab_size": 128, "output_vocab_size": 128, "dropout": 0.0}


@made
def musicgen_full() -> Made:
    text = tf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    audio = tf.EncodecConfig(
        **{"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 64, "num_lstm_layers": 1},
        **{"upsampling_ratios": [4, 2], "target_bandwidths": [1.5]},
    )
    decoder = tf.MusicgenDecoderConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
        **{"num_codebooks": 4, "pad_token_id": 60, "bos_token_id": 60},
    )
    parts = {"text_encoder": text.to_dict(), "audio_encoder": audio.to_dict(), "decoder": decoder.to_dict()}
    model = _lively(tf.MusicgenForConditionalGeneration(tf.MusicgenConfig(**parts)))
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(7, rows=4 * ROWS, vocab=60)}
    return Made(model, inputs, rows=False, generates=False)


def _time_series(name: str, **more: Any) -> Callable[[], Made]:
    def make() -> Made:
        sides = {
            f"{side}_{k}": v
            for side in ("encoder", "decoder")
            for k, v in {"layers": 2, "attention_heads": 4, "ffn_dim": 48, "layerdrop": 0.0}.items()
        }
        config = getattr(tf, f"{name}Config")(
            **{"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1},
            **{"d_model": 32, **sides, **more},
        )
        past, future = 16 + 3, 8
        inputs = {
            "past_values": noise(ROWS, past),
            "past_time_features": noise(ROWS, past, 1, seed=1),
            "past_observed_mask": torch.ones(ROWS, past),
            "future_values": noise(ROWS, future, seed=2),
            "future_time_features": noise(ROWS, future, 1, seed=3),
        }
        return Made(_lively(getattr(tf, f"{name}ForPrediction")(config)), inputs, generates=False)

    return make


MADE |= {
    "time_series_transformer_full": _time_series("TimeSeriesTransformer"),
    "informer_full": _time_series("Informer"),
    "autoformer_full": _time_series("Autoformer", moving_average=5, label_length=4),
}


def _patches(model: Any) -> Made:
    """Models of the Qwen-VL family: all pictures' patches in one list, and how many of them each picture has."""
    config, vision = model.config, model.config.vision_config
    merge = getattr(vision, "spatial_merge_size", 2)
    side, depth = 2 * merge, getattr(vision, "temporal_patch_size", 2)
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3)) or 3
    n = side * side
    start = getattr(config, "vision_start_token_id", None)
    before = torch.full((ROWS, 1), 5 if start is None else start)
    image = torch.full((ROWS, n // merge**2), config.image_token_id)
    text = torch.cat([ids(2), before, image, ids(4, seed=1)], 1)
    inputs = {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": noise(ROWS * n, channels * depth * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (text == config.image_token_id).long()

    def cut(inputs: Inputs, i: int) -> Inputs:
        return {k: v[i * n : (i + 1) * n] if k == "pixel_values" else v[i : i + 1] for k, v in inputs.items()}

    return Made(model, inputs, cut)


# configurations that a bound a field does not make valid

Given = tuple[dict[str, Any], Callable[[nn.Module], Made] | None]
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
TWO, HYBRID = {"num_hidden_layers": 2}, ["linear_attention", "full_attention"]


def _resnet() -> dict[str, Any]:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    backbone = tf.ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone}


_FIELDS: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "dots1": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1},
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {**TWO, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 1, "state_size": 16, "chunk_size": 4},
    **{
        k: {"window_size": 4, "depths": [1, 1], "num_heads": [2, 4]}  # no map may be smaller than a window
        for k in ("swin", "swinv2", "donut-swin", "maskformer-swin")
    },
    "wav2vec2-bert": {"vocab_size": 128},
    "encodec": {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "blip-2": {"image_token_index": IMAGE},
    "instructblip": {"image_token_index": IMAGE},
    "instructblipvideo": {"video_token_index": IMAGE},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "efficientnet": {"hidden_dim": 2560},
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4},
        **{"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": 48},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    },
    "qwen3_next": {**TWO, "layer_types": HYBRID},
    "granitemoehybrid": {**TWO, "layer_types": ["mamba", "attention"]},
    "bamba": {**TWO, "attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "kimi_linear": {"num_hidden_layers": 4, "num_key_value_heads": 4},
    "deberta-v2": {  # as version 3 has it
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8},
        "norm_rel_ebd": "layer_norm",
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    **{
        k: {"num_key_value_heads": 4}
        for k in (
            *(
                "deepseek_v2",
                "deepseek_v32",
                "deepseek_v3",
                "axk1",
                "axk2",
                "glm4_moe_lite",
                "glm_moe_dsa",
                "minicpm3",
                "mistral4",
            ),
            "mistral_large4_text",
        )
    },
    **{k: _resnet() for k in ("detr", "conditional_detr", "table-transformer")},
}
_PATCHED = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm46v", "glm4v_moe"),
    "paddleocr_vl",
)
GIVEN: dict[str, Given] = {k: (v, None) for k, v in _FIELDS.items()} | {
    k: (
        {
            "text_config.rope_parameters": MROPE,
            "text_config.num_hidden_layers": 4 if k == "qwen3_5" else 2,
            "vision_config.depth": 2,
        },
        _patches,
    )
    for k in _PATCHED
}
"""Kind → the fields that it needs, and what gives inputs for its model (None: they are found by trying)."""


# diffusers, timm, sentence-transformers: rows where they are installed


def _diffusers(name: str, inputs: Callable[[], Inputs], **config: Any) -> Callable[[], Made]:
    def make() -> Made:
        import diffusers

        return Made(_lively(getattr(diffusers, name)(**config)), inputs())

    return make


def _steps() -> Tensor:
    return torch.arange(ROWS) * 10 + 3


def _latents(**more: Any) -> Callable[[], Inputs]:
    return lambda: {"hidden_states": noise(ROWS, 4, 8, 8), "timestep": _steps(), **{k: v() for k, v in more.items()}}


def _context() -> Tensor:
    return noise(ROWS, 7, 24, seed=1)


HEADED = {"attention_head_dim": 8, "num_attention_heads": 4}
GRID = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, **HEADED}
MADE |= {
    "diffusers_unet": _diffusers(
        "UNet2DConditionModel",
        lambda: {"sample": noise(ROWS, 4, 8, 8), "timestep": _steps(), "encoder_hidden_states": _context()},
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
        **{"block_out_channels": (16, 32), "cross_attention_dim": 24, "attention_head_dim": 8},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "diffusers_vae": _diffusers(
        "AutoencoderKL",
        lambda: {"sample": noise(ROWS, 3, 16, 16)},
        **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "diffusers_flux": _diffusers(
        "FluxTransformer2DModel",
        lambda: {
            **{"hidden_states": noise(ROWS, 16, 4), "encoder_hidden_states": _context()},
            **{"pooled_projections": noise(ROWS, 20, seed=2), "timestep": _steps() / 50},
            **{"img_ids": ids(3, rows=16, vocab=8).float(), "txt_ids": torch.zeros(7, 3)},
        },
        **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20},
        **{"axes_dims_rope": [4, 4, 8], "guidance_embeds": False},
    ),
    "diffusers_sd3": _diffusers(
        "SD3Transformer2DModel",
        _latents(encoder_hidden_states=_context, pooled_projections=lambda: noise(ROWS, 20, seed=2)),
        **{**GRID, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20},
        **{"out_channels": 4, "pos_embed_max_size": 16},
    ),
    "diffusers_pixart": _diffusers(
        "PixArtTransformer2DModel",
        _latents(encoder_hidden_states=_context, added_cond_kwargs=lambda: {"resolution": None, "aspect_ratio": None}),
        **{**GRID, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24},
        **{"norm_type": "ada_norm_single", "use_additional_conditions": False},
    ),
    "diffusers_dit": _diffusers(
        "DiTTransformer2DModel",
        _latents(class_labels=lambda: torch.arange(ROWS)),
        **{**GRID, "out_channels": 8, "num_embeds_ada_norm": 16},
    ),
}


def _timm(name: str, side: int, **config: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=9, **config)
        return Made(_lively(model), {"x": noise(ROWS, 3, side, side)})

    return make


THIN = {"embed_dim": 32, "depth": 2, "num_heads": 4}
MADE |= {
    "timm_vit": _timm("vit_tiny_patch16_224", 32, img_size=32, **THIN),
    "timm_beit": _timm("beit_base_patch16_224", 32, img_size=32, **THIN),
    "timm_eva02": _timm("eva02_tiny_patch14_224", 28, img_size=28, **THIN),
    "timm_resnet": _timm("resnet18", 32),
    "timm_convnext": _timm("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "timm_mixer": _timm("mixer_s32_224", 32, img_size=32, embed_dim=32, num_blocks=2, patch_size=8),
    "timm_swin": _timm(
        "swin_tiny_patch4_window7_224",
        32,
        **{"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "timm_efficientnet": _timm("efficientnet_lite0", 32),
    "timm_mobilenetv3": _timm("mobilenetv3_small_050", 32),
    "timm_maxvit": _timm("maxvit_rmlp_pico_rw_256", 64, img_size=64),
    "timm_coat": _timm("coat_lite_tiny", 32, img_size=32),
    "timm_levit": _timm("levit_128s", 224),
}


class Sentences(nn.Module):
    """A SentenceTransformer takes one dict; the checks call a model with keywords."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]


@made
def sentence_transformers_bert() -> Made:
    from sentence_transformers import SentenceTransformer, models

    letters = [chr(97 + i) for i in range(26)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
        tf.BertTokenizer(f"{folder}/vocab.txt").save_pretrained(folder)
        tf.BertModel(tf.BertConfig(vocab_size=128, num_hidden_layers=2, **WIDE)).save_pretrained(folder)
        inner = models.Transformer(folder)
        pooled = models.Pooling(WIDE["hidden_size"])
    model = SentenceTransformer(modules=[inner, pooled], device="cpu")
    text = ids(vocab=30)
    return Made(_lively(Sentences(model)), {"input_ids": text, "attention_mask": torch.ones_like(text)})
