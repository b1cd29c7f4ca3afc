"""Small models of many families, with weights on which a wrong rewrite shows.

Fresh initialization hides errors: norm weights are 1, biases 0, running means 0, class tokens 0. Every such parameter
is perturbed here, deterministically.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Built = tuple[torch.nn.Module, dict[str, torch.Tensor]]

VOCABULARY = 101
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "num_labels": 7,
}


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make every parameter and running statistic of `model` non-trivial, in place.

    Norm weights become 1 + 0.3·N (0.3·N where the norm multiplies by 1 + w), biases 0.2·N, tokens, position tables and
    layer scales gain 0.2·N, running means 0.3·N and variances 0.5 + U. Matrices are scaled up to a standard deviation
    of about 1/√fan-in, so that attention is not uniform.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("bias") or parameter.ndim <= 1:
                if name.endswith("weight") and "norm" in f"{name} {type(module).__name__}".lower():
                    one_plus = "Gemma" in type(module).__name__
                    parameter.copy_(0.3 * normal(parameter) + (0.0 if one_plus else 1.0))
                elif "lambda" in name or "layer_scale" in name:
                    parameter.copy_(0.5 + 0.2 * normal(parameter))
                elif name.endswith("weight"):
                    parameter.copy_(1.0 + 0.3 * normal(parameter))
                else:
                    parameter.copy_(0.2 * normal(parameter))
            elif "token" in name or "position" in name or "relative" in name:
                parameter.copy_(0.2 * normal(parameter))
            else:
                fan_in = parameter[0].numel() if parameter.ndim != 2 else min(parameter.shape)
                parameter.copy_(normal(parameter) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def _text(class_name: str, config_name: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model = _build(class_name, getattr(transformers, config_name)(**options))
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build


def _image(class_name: str, config_name: str, size: int, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model = _build(class_name, getattr(transformers, config_name)(**options))
        generator = torch.Generator().manual_seed(1)
        return model, {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}

    return build


def _audio(class_name: str, config_name: str, samples: int, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model = _build(class_name, getattr(transformers, config_name)(**options))
        generator = torch.Generator().manual_seed(1)
        return model, {"input_values": torch.randn(2, samples, generator=generator)}

    return build


def _build(class_name: str, config: Any) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config.use_cache = False
        model = getattr(transformers, class_name)(config).eval()
    return perturb(model)


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


FAMILIES: dict[str, Callable[[], Built]] = {
    "gpt2": _text(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _text(
        "OPTForCausalLM", "OPTConfig", **_without(TEXT, "intermediate_size"), ffn_dim=80, word_embed_proj_dim=48
    ),
    "gpt_neox": _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, rotary_pct=0.5),
    "phi": _text("PhiForCausalLM", "PhiConfig", **TEXT),
    "falcon": _text(
        "FalconForCausalLM",
        "FalconConfig",
        **_without(TEXT, "intermediate_size"),
        ffn_hidden_size=80,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon_parallel": _text(
        "FalconForCausalLM",
        "FalconConfig",
        **_without(TEXT, "intermediate_size"),
        ffn_hidden_size=80,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        bias=True,
    ),
    "falcon_sequential": _text(
        "FalconForCausalLM",
        "FalconConfig",
        **_without(TEXT, "intermediate_size"),
        ffn_hidden_size=80,
        new_decoder_architecture=False,
        multi_query=False,
        parallel_attn=False,
        bias=True,
    ),
    "bloom": _text(
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=VOCABULARY,
        hidden_size=48,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "stablelm": _text(
        "StableLmForCausalLM",
        "StableLmConfig",
        **GROUPED,
        use_qkv_bias=True,
        use_parallel_residual=False,
        partial_rotary_factor=0.5,
    ),
    "starcoder2": _text("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED, sliding_window=5),
    "cohere": _text("CohereForCausalLM", "CohereConfig", **GROUPED),
    "llama": _text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, tie_word_embeddings=True),
    "qwen3": _text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16),
    "gemma2": _text(
        "Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=16, sliding_window=5, query_pre_attn_scalar=16
    ),
    "olmo2": _text("Olmo2ForCausalLM", "Olmo2Config", **GROUPED),
    "mixtral": _text("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
    "bert": _text("BertModel", "BertConfig", **TEXT),
    "modernbert": _text(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        **TEXT,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=6,
        global_attn_every_n_layers=2,
        norm_bias=True,
    ),
    "vit": _image("ViTForImageClassification", "ViTConfig", 24, **IMAGE),
    "deit": _image("DeiTForImageClassification", "DeiTConfig", 24, **IMAGE),
    "dinov2": _image(
        "Dinov2Model", "Dinov2Config", 24, **_without(IMAGE, "intermediate_size", "num_labels"), mlp_ratio=2
    ),
    "beit": _image(
        "BeitForImageClassification", "BeitConfig", 24, **IMAGE, use_relative_position_bias=True, use_mask_token=False
    ),
    "swin": _image(
        "SwinForImageClassification",
        "SwinConfig",
        32,
        image_size=32,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=7,
    ),
    "convnext": _image(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        32,
        image_size=32,
        hidden_sizes=[16, 24],
        depths=[1, 2],
        num_stages=2,
        num_labels=7,
        layer_scale_init_value=0.5,
    ),
    "clip_vision": _image("CLIPVisionModel", "CLIPVisionConfig", 24, **_without(IMAGE, "num_labels")),
    "siglip_vision": _image("SiglipVisionModel", "SiglipVisionConfig", 24, **_without(IMAGE, "num_labels")),
    "wav2vec2": _audio(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        16000,
        **_without(IMAGE, "image_size", "patch_size", "num_labels"),
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_dim=(16, 24),
        conv_kernel=(40, 10),
        conv_stride=(40, 10),
        conv_bias=True,
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
    "resnet": _image(
        "ResNetForImageClassification",
        "ResNetConfig",
        32,
        embedding_size=16,
        hidden_sizes=[16, 24, 40],
        depths=[1, 2, 1],
        layer_type="bottleneck",
        num_labels=7,
        image_size=32,
    ),
}
"""Family name → a function that builds (model in evaluation mode, example inputs)."""


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family as `save_pretrained` does, and return its folder."""
    model, _ = FAMILIES[name]()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder
