"""The zoo's catalogue: small networks of as many kinds as transformers builds, with non-trivial random weights.

Two layers, widths of 32 to 48, odd sizes where an architecture allows them. `ZOO` maps a name to its kind, a function
that builds the model in evaluation mode, and example inputs. Parameters and statistics are perturbed as in
`tests/families.py`, where the first families live.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from families import FAMILIES, GROUPED, IMAGE, TEXT, VOCABULARY, perturb

Inputs = dict[str, torch.Tensor]
Built = tuple[torch.nn.Module, Inputs]

BATCH, SEQUENCE, DECODER_SEQUENCE = 2, 9, 5


KINDS = ("decoder", "state-space", "encoder", "encoder–decoder", "vision", "audio", "vision–language")
"""What families are of, in the order of the table."""


@dataclass(frozen=True)
class Family:
    """One network of the zoo: the table it stands in, and `build() -> (model, example inputs)`."""

    kind: str
    build: Callable[[], Built]


# ── Example inputs ──────────────────────────────────────────────────────────────────────────────────────────────────


def _ids(length: int = SEQUENCE, low: int = 3, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def text() -> Inputs:
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens() -> Inputs:
    """Token ids alone: recurrent networks take no mask."""
    return {"input_ids": _ids()}


def encoder_decoder() -> Inputs:
    return {**text(), "decoder_input_ids": _ids(DECODER_SEQUENCE)}


def image(size: int = 24, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": _normal(BATCH, channels, size, size)}


def video(size: int = 16, frames: int = 4) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": _normal(BATCH, frames, 3, size, size)}


def waveform(samples: int = 400) -> Callable[[], Inputs]:
    return lambda: {"input_values": _normal(BATCH, samples)}


def features(*shape: int, name: str = "input_features") -> Callable[[], Inputs]:
    return lambda: {name: _normal(BATCH, *shape)}


def speech_to_text(*shape: int) -> Callable[[], Inputs]:
    return lambda: {"input_features": _normal(BATCH, *shape), "decoder_input_ids": _ids(DECODER_SEQUENCE)}


def text_and_image(size: int = 24) -> Callable[[], Inputs]:
    return lambda: {**text(), **image(size)()}


def image_tokens(size: int, token: int, count: int) -> Callable[[], Inputs]:
    """Text in which the image's patches have their places."""

    def made() -> Inputs:
        ids = _ids(SEQUENCE + count, high=VOCABULARY - 3)
        ids[:, 1 : 1 + count] = token
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(size)()}

    return made


def image_prefix(size: int, token: int, count: int) -> Callable[[], Inputs]:
    """The same, told apart by token types: those of type 0 see each other. (Without types, transformers 5.23 leaves the
    mask out where it computes and makes one where it exports.)"""

    def made() -> Inputs:
        given = image_tokens(size, token, count)()
        types = torch.zeros_like(given["input_ids"])
        types[:, 1 + count :] = 1
        return {**given, "token_type_ids": types}

    return made


# ── Building ────────────────────────────────────────────────────────────────────────────────────────────────────────

ZOO: dict[str, Family] = {}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def add(name: str, kind: str, cls: str, config: str, inputs: Callable[[], Inputs], **options: Any) -> None:
    """Put a family into the zoo: the model class and configuration class by name, example inputs, and options.

    A name that `tests/families.py` has is that family.
    """

    def build() -> Built:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(transformers, config)(**options)
            for part in {id(part): part for part in (made, made.get_text_config())}.values():
                part.use_cache = False
            torch.manual_seed(0)
            model = getattr(transformers, cls)(made).eval()
        return perturb(model), inputs()

    if name in ZOO:
        raise ValueError(f"{name} is in the zoo already")
    ZOO[name] = Family(kind, FAMILIES.get(name, build))


# ── Language: decoders ──────────────────────────────────────────────────────────────────────────────────────────────


def decoder(name: str, prefix: str, **options: Any) -> None:
    add(name, "decoder", f"{prefix}ForCausalLM", f"{prefix}Config", text, **options)


_NGPT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

decoder("llama_mqa", "Llama", **{**GROUPED, "num_key_value_heads": 1})
decoder(
    "llama_biases",
    "Llama",
    **{**TEXT, "hidden_size": 40, "intermediate_size": 51},
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)
decoder("llama_wide_heads", "Llama", **{**GROUPED, "hidden_size": 44, "intermediate_size": 77}, head_dim=16)
decoder("mistral", "Mistral", **GROUPED, sliding_window=5)
decoder("ministral", "Ministral", **GROUPED, head_dim=12, sliding_window=5)
decoder("gpt_neo", "GPTNeo", **_NGPT, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=5)  # fmt: skip
decoder("gptj", "GPTJ", **_NGPT, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
decoder("codegen", "CodeGen", **_NGPT, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
decoder("gpt_bigcode", "GPTBigCode", **_NGPT, n_embd=48, n_layer=2, n_head=4, n_positions=64, multi_query=True)
decoder("gpt_neox_sequential", "GPTNeoX", **TEXT, use_parallel_residual=False, attention_bias=False)
decoder("gpt_neox_japanese", "GPTNeoXJapanese", **_without(TEXT, "intermediate_size"), intermediate_multiple_size=2)
decoder("mpt", "Mpt", **{"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64})
decoder("opt_post_norm", "OPT", **_without(TEXT, "intermediate_size"), ffn_dim=80, word_embed_proj_dim=40,
        do_layer_norm_before=False)  # fmt: skip
decoder("phi3", "Phi3", **GROUPED)
decoder("phi_query_key_norm", "Phi", **TEXT, qk_layernorm=True)
decoder("phimoe", "Phimoe", **GROUPED, num_local_experts=3)
decoder("stablelm_parallel", "StableLm", **GROUPED, use_parallel_residual=True, qk_layernorm=True,
        partial_rotary_factor=0.5)  # fmt: skip
decoder("gemma", "Gemma", **GROUPED, head_dim=16)
add("gemma3", "decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", text, **GROUPED, head_dim=16, sliding_window=5,
    query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
decoder("vaultgemma", "VaultGemma", **GROUPED, head_dim=16, sliding_window=5, query_pre_attn_scalar=16)
decoder("olmo", "Olmo", **GROUPED, clip_qkv=8.0)
decoder("olmo3", "Olmo3", **GROUPED, sliding_window=5)
decoder("olmoe", "Olmoe", **{**GROUPED, "intermediate_size": 40}, num_experts=3, num_experts_per_tok=2)
decoder("flex_olmo", "FlexOlmo", **{**GROUPED, "intermediate_size": 40}, num_experts=3, num_experts_per_tok=2)
decoder("granite", "Granite", **GROUPED, embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2,
        logits_scaling=4.0)  # fmt: skip
decoder("granitemoe", "GraniteMoe", **GROUPED, num_local_experts=3, num_experts_per_tok=2, residual_multiplier=0.3)
decoder("granitemoe_shared", "GraniteMoeShared", **GROUPED, num_local_experts=3, num_experts_per_tok=2,
        shared_intermediate_size=40)  # fmt: skip
decoder("cohere2", "Cohere2", **GROUPED, sliding_window=5)
decoder("glm", "Glm", **GROUPED, head_dim=12, attention_bias=True)
decoder("glm4", "Glm4", **GROUPED, head_dim=12, attention_bias=True)
decoder("nemotron", "Nemotron", **GROUPED)
decoder("persimmon", "Persimmon", **TEXT)
decoder("smollm3", "SmolLM3", **GROUPED)
decoder("helium", "Helium", **GROUPED, head_dim=12)
decoder("arcee", "Arcee", **GROUPED)
decoder("apertus", "Apertus", **GROUPED)
decoder("seed_oss", "SeedOss", **GROUPED, head_dim=16)
decoder("ernie4_5", "Ernie4_5", **GROUPED, use_bias=True)
decoder("exaone4", "Exaone4", **GROUPED, sliding_window=5)
decoder("hunyuan_dense", "HunYuanDenseV1", **GROUPED, head_dim=12)
decoder("bitnet", "BitNet", **GROUPED)
decoder("nanochat", "NanoChat", **GROUPED)
decoder("diffllama", "DiffLlama", **GROUPED)
decoder("doge", "Doge", **GROUPED)
decoder("jais2", "Jais2", **GROUPED)
decoder("youtu", "Youtu", **TEXT, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=12)  # fmt: skip
decoder("minicpm3", "MiniCPM3", **TEXT, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=12)  # fmt: skip
decoder("qwen2_moe", "Qwen2Moe", **GROUPED, **_MOE, shared_expert_intermediate_size=56, decoder_sparse_step=1)
decoder("qwen3_moe", "Qwen3Moe", **GROUPED, **_MOE, head_dim=16, decoder_sparse_step=1)
decoder("gpt_oss", "GptOss", **GROUPED, head_dim=12, num_local_experts=3, num_experts_per_tok=2, sliding_window=5)
decoder("deepseek_v2", "DeepseekV2", **TEXT, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=12, n_routed_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=40, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1,
        topk_method="greedy")  # fmt: skip
decoder("deepseek_v3", "DeepseekV3", **TEXT, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=40, first_k_dense_replace=1, n_shared_experts=1, n_group=2, topk_group=1)  # fmt: skip
decoder("dots1", "Dots1", **GROUPED, head_dim=12, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=40, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1)  # fmt: skip
decoder("glm4_moe", "Glm4Moe", **GROUPED, head_dim=12, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=40, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1)  # fmt: skip
decoder("dbrx", "Dbrx", vocab_size=VOCABULARY, d_model=48, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 3, "moe_top_k": 2})  # fmt: skip
decoder("ernie4_5_moe", "Ernie4_5_Moe", **GROUPED, moe_intermediate_size=40, moe_num_experts=3, moe_k=2,
        moe_layer_start_index=1, moe_num_shared_experts=1)  # fmt: skip
decoder("minimax", "MiniMax", **GROUPED, num_local_experts=3, num_experts_per_tok=2, head_dim=12, block_size=4)
decoder("xglm", "XGLM", vocab_size=VOCABULARY, d_model=48, ffn_dim=80, num_layers=2, attention_heads=4,
        max_position_embeddings=64, pad_token_id=0)  # fmt: skip
decoder("biogpt", "BioGpt", **TEXT)
decoder("modernbert_decoder", "ModernBertDecoder", **TEXT, cls_token_id=1, sep_token_id=2, local_attention=6,
        norm_bias=True)  # fmt: skip
decoder("bart_decoder", "Bart", vocab_size=VOCABULARY, d_model=48, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip

# ── Language: state spaces, convolutions, recurrences ───────────────────────────────────────────────────────────────


def hybrid(name: str, prefix: str, inputs: Callable[[], Inputs] = tokens, **options: Any) -> None:
    add(name, "state-space", f"{prefix}ForCausalLM", f"{prefix}Config", inputs, **options)


_SSM = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
hybrid("mamba", "Mamba", **_SSM, time_step_rank=4)
hybrid("falcon_mamba", "FalconMamba", **_SSM, time_step_rank=4)
hybrid("mamba2", "Mamba2", **_SSM, num_heads=4, head_dim=16, n_groups=2, chunk_size=4)
hybrid("lfm2", "Lfm2", text, **GROUPED, layer_types=["conv", "full_attention"])
hybrid("recurrent_gemma", "RecurrentGemma", text, **GROUPED, lru_width=48, attention_window_size=8,
       block_types=["recurrent", "attention"])  # fmt: skip
hybrid("rwkv", "Rwkv", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64)
hybrid("jamba", "Jamba", text, **GROUPED, num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4,
       attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
       use_mamba_kernels=False)  # fmt: skip
hybrid("bamba", "Bamba", text, **GROUPED, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=4, mamba_n_groups=1,
       mamba_d_head=24, attn_layer_indices=[1])  # fmt: skip
hybrid("falcon_h1", "FalconH1", text, **GROUPED, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=4,
       mamba_d_head=24, mamba_d_ssm=96)  # fmt: skip
hybrid("qwen3_next", "Qwen3Next", text, **GROUPED, **_MOE, head_dim=16, shared_expert_intermediate_size=40,
       linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
       layer_types=["linear_attention", "full_attention"])  # fmt: skip

# ── Language: encoders ──────────────────────────────────────────────────────────────────────────────────────────────


def encoder(name: str, prefix: str, cls: str = "ForMaskedLM", **options: Any) -> None:
    add(name, "encoder", f"{prefix}{cls}", f"{prefix}Config", text, **options)


encoder("roberta", "Roberta", **TEXT, type_vocab_size=1)
encoder("roberta_prelayernorm", "RobertaPreLayerNorm", **TEXT)
encoder("xlm_roberta", "XLMRoberta", "ForSequenceClassification", **TEXT)
encoder("xlm_roberta_xl", "XLMRobertaXL", **TEXT)
encoder("camembert", "Camembert", **TEXT)
encoder("electra", "Electra", **TEXT, embedding_size=32)
encoder("albert", "Albert", **TEXT, embedding_size=32)
encoder("distilbert", "DistilBert", vocab_size=VOCABULARY, dim=48, hidden_dim=80, n_layers=2, n_heads=4,
        max_position_embeddings=64, pad_token_id=0)  # fmt: skip
encoder("megatron_bert", "MegatronBert", **TEXT)
encoder("mpnet", "MPNet", **TEXT)
encoder("deberta", "Deberta", **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"])
encoder("deberta_v2", "DebertaV2", **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"])
encoder("convbert", "ConvBert", **TEXT, embedding_size=48)
encoder("squeezebert", "SqueezeBert", **TEXT, embedding_size=48, q_groups=2, k_groups=2, v_groups=2, post_groups=1,
        intermediate_groups=2, output_groups=2)  # fmt: skip
encoder("mobilebert", "MobileBert", **TEXT, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32)
encoder("rembert", "RemBert", **TEXT, input_embedding_size=32, output_embedding_size=40)
encoder("roformer", "RoFormer", **TEXT, embedding_size=48)
encoder("esm", "Esm", **TEXT, position_embedding_type="rotary", mask_token_id=3, token_dropout=False)
encoder("esm_absolute", "Esm", **TEXT, position_embedding_type="absolute", mask_token_id=3, emb_layer_norm_before=True)
encoder("ernie", "Ernie", **TEXT)
encoder("eurobert", "EuroBert", **GROUPED, mask_token_id=3)
encoder("nomic_bert", "NomicBert", **TEXT)
encoder("data2vec_text", "Data2VecText", **TEXT)
encoder("layoutlm", "LayoutLM", **TEXT)
encoder("ibert", "IBert", **TEXT)
add("fnet", "encoder", "FNetForMaskedLM", "FNetConfig", tokens, **_without(TEXT, "num_attention_heads"))
encoder("gte", "Gte", **TEXT)
encoder("xmod", "Xmod", **TEXT, default_language="en_XX", languages=["en_XX"], pre_norm=True)
encoder("t5_encoder", "T5", "EncoderModel", vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=80, num_layers=2,
        num_heads=4)  # fmt: skip
encoder("clip_text", "CLIPText", "Model", **{**TEXT, "eos_token_id": VOCABULARY - 1})

# ── Vision ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def vision(
    name: str,
    prefix: str,
    cls: str = "ForImageClassification",
    inputs: Callable[[], Inputs] | None = None,
    **options: Any,
) -> None:
    add(name, "vision", f"{prefix}{cls}", f"{prefix}Config", inputs or image(24), **options)


_FEATURES = _without(IMAGE, "num_labels")
vision("vit_msn", "ViTMSN", **IMAGE)
vision("vit_odd", "ViT", **{**IMAGE, "hidden_size": 36, "intermediate_size": 51, "qkv_bias": False})
vision("ijepa", "IJepa", **IMAGE)
vision("dinov2_registers", "Dinov2WithRegisters", **_without(IMAGE, "intermediate_size"), mlp_ratio=2,
       num_register_tokens=3)  # fmt: skip
vision("dinov2_gated", "Dinov2", **_without(IMAGE, "intermediate_size"), mlp_ratio=2, use_swiglu_ffn=True)
vision("dinov3_vit", "DINOv3ViT", "Model", **_FEATURES, num_register_tokens=2, use_gated_mlp=True)
vision("dinov3_convnext", "DINOv3ConvNext", "Model", image(32), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1],
       image_size=32)  # fmt: skip
vision("data2vec_vision", "Data2VecVision", **IMAGE, use_relative_position_bias=True, use_mask_token=False)
vision("vit_mae_decoder", "ViTMAE", "Model", **_FEATURES, mask_ratio=0.0)
vision("yolos", "Yolos", "ForObjectDetection", **{**IMAGE, "image_size": [24, 24]}, num_detection_tokens=5)
vision("convnextv2", "ConvNextV2", inputs=image(32), image_size=32, hidden_sizes=[16, 24], depths=[1, 2], num_stages=2,
       num_labels=7)  # fmt: skip
vision("cvt", "Cvt", inputs=image(32), embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=7)
vision("poolformer", "PoolFormer", inputs=image(32), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], num_labels=7)
vision("segformer", "Segformer", inputs=image(32), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       num_attention_heads=[1, 2, 2, 4], num_labels=7)  # fmt: skip
vision("swinv2", "Swinv2", inputs=image(32), image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4],
       window_size=4, num_labels=7)  # fmt: skip
vision("pvt", "Pvt", inputs=image(32), image_size=32, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       num_attention_heads=[1, 2, 2, 4], num_labels=7)  # fmt: skip
vision("pvt_v2", "PvtV2", inputs=image(32), image_size=32, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       num_attention_heads=[1, 2, 2, 4], num_labels=7)  # fmt: skip
vision("levit", "Levit", inputs=image(64), image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 4],
       depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=7)  # fmt: skip
vision("mobilenet_v1", "MobileNetV1", inputs=image(32), image_size=32, depth_multiplier=0.25, num_labels=7)
vision("mobilenet_v2", "MobileNetV2", inputs=image(32), image_size=32, depth_multiplier=0.25, num_labels=7)
vision("mobilevit", "MobileViT", inputs=image(32), image_size=32, hidden_sizes=[16, 24, 32],
       neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 48], num_attention_heads=2, num_labels=7)  # fmt: skip
vision("mobilevitv2", "MobileViTV2", inputs=image(64), image_size=64, width_multiplier=0.25, num_labels=7,
       base_attn_unit_dims=[32, 48, 64], n_attn_blocks=[1, 1, 1])  # fmt: skip
vision("efficientnet", "EfficientNet", inputs=image(32), image_size=32, width_coefficient=0.25, depth_coefficient=0.3,
       hidden_dim=320, num_labels=7)  # fmt: skip
vision("regnet", "RegNet", inputs=image(32), embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       groups_width=8, num_labels=7)  # fmt: skip
vision("resnet_basic", "ResNet", inputs=image(32), embedding_size=16, hidden_sizes=[16, 24], depths=[1, 2],
       layer_type="basic", num_labels=7)  # fmt: skip
vision("bit", "Bit", inputs=image(32), embedding_size=16, hidden_sizes=[32, 48], depths=[1, 1], num_groups=4,
       num_labels=7)  # fmt: skip
vision("focalnet", "FocalNet", inputs=image(32), image_size=32, patch_size=4, embed_dim=24, hidden_sizes=[24, 48],
       depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3], num_labels=7)  # fmt: skip
vision("hiera", "Hiera", inputs=image(32), image_size=[32, 32], embed_dim=24, depths=[1, 1], num_heads=[1, 2],
       patch_size=[3, 3], patch_stride=[4, 4], patch_padding=[1, 1], masked_unit_size=[4, 4],
       masked_unit_attention=[True, False], query_stride=[2, 2], num_query_pool=1, num_labels=7)  # fmt: skip
vision("swiftformer", "SwiftFormer", inputs=image(32), image_size=32, embed_dims=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       num_labels=7)  # fmt: skip
vision("hgnet_v2", "HGNetV2", inputs=image(32), num_labels=7, stem_channels=[3, 16, 16],
       stage_in_channels=[16, 24, 32, 40], stage_mid_channels=[16, 16, 16, 16], stage_out_channels=[24, 32, 40, 48],
       stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2], hidden_sizes=[24, 32, 40, 48],
       embedding_size=16)  # fmt: skip
vision("textnet", "TextNet", inputs=image(32), num_labels=7)
vision("vitdet", "VitDet", "Model", image(32), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
       image_size=32, pretrain_image_size=32, patch_size=8, mlp_ratio=2, use_relative_position_embeddings=True,
       window_block_indices=[0], window_size=2)  # fmt: skip
vision("dpt", "DPT", "ForDepthEstimation", image(32), **{**_FEATURES, "image_size": 32, "num_hidden_layers": 4},
       is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
       reassemble_factors=[4, 2, 1, 0.5])  # fmt: skip
vision("glpn", "GLPN", "ForDepthEstimation", image(32), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
       num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16)  # fmt: skip
vision("timesformer", "Timesformer", "ForVideoClassification", video(), **{**IMAGE, "image_size": 16}, num_frames=4)
vision("videomae", "VideoMAE", "ForVideoClassification", video(), **{**IMAGE, "image_size": 16}, num_frames=4,
       tubelet_size=2)  # fmt: skip
vision("vivit", "Vivit", "ForVideoClassification", video(), **{**_without(IMAGE, "patch_size"), "image_size": 16},
       num_frames=4, tubelet_size=[2, 8, 8])  # fmt: skip
add("aimv2_vision", "vision", "Aimv2VisionModel", "Aimv2VisionConfig", image(24), **_FEATURES)
add("mlcd_vision", "vision", "MLCDVisionModel", "MLCDVisionConfig", image(24), **_FEATURES)
add("blip_vision", "vision", "BlipVisionModel", "BlipVisionConfig", image(24), **_FEATURES)
add("sam_vision", "vision", "SamVisionModel", "SamVisionConfig", image(32), hidden_size=48, num_hidden_layers=2,
    num_attention_heads=4, image_size=32, patch_size=8, mlp_ratio=2.0, mlp_dim=80, output_channels=16, window_size=2,
    global_attn_indexes=[1])  # fmt: skip
add("imagegpt", "vision", "ImageGPTForImageClassification", "ImageGPTConfig", tokens, vocab_size=VOCABULARY, n_embd=48,
    n_layer=2, n_head=4, n_positions=64, num_labels=7)  # fmt: skip

# ── Audio ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_SPEECH = {
    **_without(TEXT, "vocab_size", "max_position_embeddings"),
    **{"vocab_size": 32, "conv_dim": [16, 24], "conv_stride": [5, 4], "conv_kernel": [10, 5]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}


def audio(
    name: str, prefix: str, cls: str = "ForCTC", inputs: Callable[[], Inputs] | None = None, **options: Any
) -> None:
    add(name, "audio", f"{prefix}{cls}", f"{prefix}Config", inputs or waveform(), **options)


audio("wav2vec2", "Wav2Vec2", **_SPEECH)
audio("wav2vec2_stable", "Wav2Vec2", **_SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
audio("hubert", "Hubert", **_SPEECH)
audio("wavlm", "WavLM", **_SPEECH, num_buckets=16, max_bucket_distance=32)
audio("unispeech", "UniSpeech", **_SPEECH, num_ctc_classes=32)
audio("unispeech_sat", "UniSpeechSat", **_SPEECH, num_ctc_classes=32)
audio("sew", "SEW", **_SPEECH, squeeze_factor=2)
audio("data2vec_audio", "Data2VecAudio", **_SPEECH, conv_pos_kernel_size=3, num_conv_pos_embedding_layers=1)
audio("wav2vec2_conformer", "Wav2Vec2Conformer", **_SPEECH, position_embeddings_type="rotary",
      conv_depthwise_kernel_size=5)  # fmt: skip
audio("wav2vec2_bert", "Wav2Vec2Bert", inputs=features(12, 20), **_without(TEXT, "vocab_size"), vocab_size=32,
      feature_projection_input_dim=20, position_embeddings_type="relative_key",
      conv_depthwise_kernel_size=5)  # fmt: skip
audio("ast", "AST", "ForAudioClassification", features(24, 16, name="input_values"), hidden_size=48,
      intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, patch_size=8, max_length=24, num_mel_bins=16,
      frequency_stride=8, time_stride=8, num_labels=7)  # fmt: skip
audio("whisper_encoder", "Whisper", "ForAudioClassification", features(8, 24), d_model=48, encoder_layers=2,
      encoder_attention_heads=4, encoder_ffn_dim=80, num_mel_bins=8, max_source_positions=12, vocab_size=VOCABULARY,
      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, num_labels=7)  # fmt: skip
add("parakeet", "audio", "ParakeetForCTC", "ParakeetCTCConfig", features(32, 16),
    encoder_config={"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
                    "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 5,
                    "max_position_embeddings": 64},
    vocab_size=32, pad_token_id=31)  # fmt: skip
audio("encodec", "Encodec", "Model", features(1, 320, name="input_values"), num_filters=8, hidden_size=16,
      codebook_size=16, codebook_dim=16, num_residual_layers=1, upsampling_ratios=[4, 2],
      num_lstm_layers=1)  # fmt: skip
audio("dac", "Dac", "Model", features(1, 320, name="input_values"), encoder_hidden_size=8, downsampling_ratios=[2, 4],
      decoder_hidden_size=32, n_codebooks=2, codebook_size=16, codebook_dim=4)  # fmt: skip

# ── Encoder and decoder ─────────────────────────────────────────────────────────────────────────────────────────────


def pair(name: str, prefix: str, inputs: Callable[[], Inputs] = encoder_decoder, **options: Any) -> None:
    add(name, "encoder–decoder", f"{prefix}ForConditionalGeneration", f"{prefix}Config", inputs, **options)


_T5 = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
_BART = {
    **{"vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 80},
    **{"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 3},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
}
pair("t5", "T5", **_T5)
pair("t5_gated", "T5", **{**_T5, "d_kv": 10}, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
pair("mt5", "MT5", **_T5, feed_forward_proj="gated-gelu")
pair("umt5", "UMT5", **_T5, feed_forward_proj="gated-gelu")
pair("longt5", "LongT5", **_T5, local_radius=3)
pair("switch_transformers", "SwitchTransformers", **_T5, num_experts=2, num_sparse_encoder_layers=1,
     num_sparse_decoder_layers=1, expert_capacity=16)  # fmt: skip
pair("bart", "Bart", **_BART)
pair("mbart", "MBart", **_BART)
pair("pegasus", "Pegasus", **_BART)
pair("m2m100", "M2M100", **_BART)
pair("blenderbot", "Blenderbot", **_BART)
pair("blenderbot_small", "BlenderbotSmall", **_BART)
pair("plbart", "PLBart", **_BART)
pair("mvp", "Mvp", **_BART)
add("marian", "encoder–decoder", "MarianMTModel", "MarianConfig", encoder_decoder, **_BART)
pair("prophetnet", "ProphetNet", vocab_size=VOCABULARY, hidden_size=48, num_encoder_layers=2, num_decoder_layers=2,
     num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80,
     max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_T5GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}
pair("t5gemma", "T5Gemma", encoder=_T5GEMMA, decoder={**_T5GEMMA, "cross_attention_hidden_size": 48},
     vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
pair("whisper", "Whisper", speech_to_text(8, 24), **{**_without(_BART, "max_position_embeddings"), "num_mel_bins": 8},
     max_source_positions=12, max_target_positions=64)  # fmt: skip
pair("speech_to_text", "Speech2Text", speech_to_text(24, 16), **_without(_BART, "max_position_embeddings"),
     num_conv_layers=1, conv_kernel_sizes=[3], conv_channels=16, input_feat_per_channel=16, max_source_positions=64,
     max_target_positions=64)  # fmt: skip
pair("moonshine", "Moonshine",
     lambda: {"input_values": _normal(BATCH, 1200), "decoder_input_ids": _ids(DECODER_SEQUENCE)},
     vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, encoder_num_hidden_layers=2,
     decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
     max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip

# ── Vision and language ─────────────────────────────────────────────────────────────────────────────────────────────


def multimodal(name: str, cls: str, config: str, inputs: Callable[[], Inputs] | None = None, **options: Any) -> None:
    add(name, "vision–language", cls, config, inputs or text_and_image(), **options)


_TOWER = _without(IMAGE, "num_labels")
_CLIP_TEXT = {**TEXT, "eos_token_id": VOCABULARY - 1}
multimodal("clip", "CLIPModel", "CLIPConfig", text_config=_CLIP_TEXT, vision_config=_TOWER, projection_dim=20)
multimodal("siglip", "SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=_TOWER)
multimodal("metaclip_2", "MetaClip2Model", "MetaClip2Config", text_config=_CLIP_TEXT, vision_config=_TOWER,
           projection_dim=20)  # fmt: skip
multimodal("altclip", "AltCLIPModel", "AltCLIPConfig", text_config={**TEXT, "project_dim": 20}, vision_config=_TOWER,
           projection_dim=20)  # fmt: skip
multimodal("chinese_clip", "ChineseCLIPModel", "ChineseCLIPConfig", text_config=TEXT, vision_config=_TOWER,
           projection_dim=20)  # fmt: skip
multimodal("blip", "BlipForConditionalGeneration", "BlipConfig",
           text_config={**TEXT, "encoder_hidden_size": 48, "sep_token_id": 2}, vision_config=_TOWER,
           projection_dim=20)  # fmt: skip
multimodal("clipseg", "CLIPSegForImageSegmentation", "CLIPSegConfig", text_config=_CLIP_TEXT, vision_config=_TOWER,
           projection_dim=20, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=2,
           decoder_intermediate_size=24)  # fmt: skip
multimodal("groupvit", "GroupViTModel", "GroupViTConfig", text_config=_CLIP_TEXT,
           vision_config={"hidden_size": 32, "intermediate_size": 40, "depths": [1, 1, 1], "num_hidden_layers": 3,
                          "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4], "num_attention_heads": 4,
                          "image_size": 24, "patch_size": 4},
           projection_dim=20, projection_intermediate_dim=24)  # fmt: skip
multimodal("vilt", "ViltModel", "ViltConfig", **{**TEXT, "image_size": 24, "patch_size": 8}, modality_type_vocab_size=2)
multimodal("git", "GitForCausalLM", "GitConfig", **TEXT, vision_config=_TOWER, num_image_with_embedding=None)
multimodal("llava", "LlavaForConditionalGeneration", "LlavaConfig", image_tokens(24, 100, 9),
           vision_config={**_TOWER, "model_type": "clip_vision_model"},
           text_config={**GROUPED, "model_type": "llama"}, image_token_index=100,
           vision_feature_select_strategy="default", vision_feature_layer=-1)  # fmt: skip
multimodal("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", image_prefix(24, 100, 9),
           vision_config={**_TOWER, "model_type": "siglip_vision_model"},
           text_config={**GROUPED, "model_type": "gemma", "head_dim": 12, "num_image_tokens": 9}, image_token_index=100,
           projection_dim=48)  # fmt: skip
multimodal("vipllava", "VipLlavaForConditionalGeneration", "VipLlavaConfig", image_tokens(24, 100, 9),
           vision_config={**_TOWER, "model_type": "clip_vision_model"},
           text_config={**GROUPED, "model_type": "llama"}, image_token_index=100,
           vision_feature_layers=[-1, -2])  # fmt: skip
multimodal("florence2", "Florence2ForConditionalGeneration", "Florence2Config",
           lambda: {**image_tokens(32, 100, 17)(), "decoder_input_ids": _ids(DECODER_SEQUENCE)},
           text_config={**_BART, "model_type": "bart"},
           vision_config={"embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 4], "num_groups": [2, 4],
                          "window_size": 2, "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
                          "patch_prenorm": [False, True], "projection_dim": 48},
           image_token_id=100)  # fmt: skip
multimodal("owlvit", "OwlViTModel", "OwlViTConfig", text_config=_CLIP_TEXT, vision_config=_TOWER, projection_dim=20)
multimodal("bridgetower", "BridgeTowerModel", "BridgeTowerConfig",
           lambda: {**text_and_image()(), "pixel_mask": torch.ones(BATCH, 24, 24, dtype=torch.int64)},
           hidden_size=64, num_hidden_layers=2, num_attention_heads=4, text_config={**TEXT, "hidden_size": 64},
           vision_config={**_TOWER, "hidden_size": 64})  # fmt: skip

# ── Those of tests/families.py ──────────────────────────────────────────────────────────────────────────────────────

_KINDS = {
    "vision": "vit deit dinov2 beit swin convnext clip_vision siglip_vision resnet",
    "encoder": "bert modernbert",
}
for _name in sorted(FAMILIES.keys() - ZOO.keys()):
    _kind = next((kind for kind, members in _KINDS.items() if _name in members.split()), "decoder")
    ZOO[_name] = Family(_kind, FAMILIES[_name])
ZOO = dict(sorted(ZOO.items(), key=lambda item: KINDS.index(item[1].kind)))
