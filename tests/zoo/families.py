"""The kinds that `make test` checks, chosen for how different their code is; `make zoo` checks all, these first."""

FAMILIES = {
    "decoders": "llama gpt2 opt bloom falcon mpt phi gemma2 gemma3_text gemma3n_text qwen2 qwen3 gptj olmo2 codegen",
    "experts": "mixtral qwen2_moe switch_transformers nllb-moe deepseek_v3 gpt_oss olmoe phimoe",
    "recurrent": "mamba mamba2 rwkv qwen3_next recurrent_gemma",
    "encoders": "bert roberta deberta deberta-v2 electra albert modernbert longformer funnel xlnet fnet",
    "encoder-decoders": "t5 bart pegasus whisper mbart led",
    "vision": "vit swin convnext detr segformer beit mobilenet_v2 dinov2 resnet yolos",
    "audio": "wav2vec2 hubert sew-d wav2vec2-bert encodec",
    "several kinds of input": "clip blip llava_pixels gemma3_pixels qwen2_vl siglip",
    "torch": "torch_transformer torch_transformer_encoder torch_lstm torch_gru torch_shared_layers",
}
CHOSEN = " ".join(FAMILIES.values()).split()
