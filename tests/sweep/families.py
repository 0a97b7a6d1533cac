"""The model families of the sweep: tiny models of transformers and timm with random weights, and inputs for them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# A torchvision that was built for CUDA cannot load its operators beside a torch without CUDA, and then not be imported.
# No model needs them, so that their names are enough.
try:
    with contextlib.suppress(ImportError):
        import torchvision
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

Inputs = dict[str, Tensor]
Family = Callable[[], tuple[nn.Module, Inputs]]
"""Makes a model, always the same one, and its inputs by name."""

WITHOUT_FLOAT64 = {"LongformerForMaskedLM"}  # it leaves memory unset, which shows as NaN, in plain torch as well


def dtypes(name: str, model: nn.Module) -> tuple[torch.dtype, ...]:
    """The dtypes in which gradients of a model can be compared: float64, and float32, for which there is native code.

    Batch normalisation over a few small images makes rounding large, so that float32 says nothing.
    """
    exact = () if name in WITHOUT_FLOAT64 else (torch.float64,)
    amplifies = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return exact if amplifies else (*exact, torch.float32)


# ---------------------------------------------------------------- inputs


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(3))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _text() -> Inputs:
    return {"input_ids": _tokens(2, 8)}


def _texts() -> Inputs:
    return {"input_ids": _tokens(2, 8), "decoder_input_ids": _tokens(2, 6)}


def _image(size: int = 32) -> Inputs:
    return {"pixel_values": _floats(2, 3, size, size)}


def _wave() -> Inputs:
    return {"input_values": _floats(2, 800)}


# ---------------------------------------------------------------- transformers

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_MARKS = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _WIDTHS | _MARKS | {"num_key_value_heads": 2, "head_dim": 8}
_IMAGE = _WIDTHS | {"image_size": 32, "patch_size": 8, "num_labels": 5}
_T5 = _MARKS | {"d_model": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "d_ff": 48, "d_kv": 8}
_SIDES = ("encoder", "decoder")
_BART = (
    _MARKS
    | {"d_model": 32, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    | {
        f"{side}_{size}": of
        for side in _SIDES
        for size, of in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()
    }
)
_SPEECH = _TEXT | {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,  # of frames that are masked in place, as in training
}
_STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
_WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4, "image_size": 32}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EAGER = {"experts_implementation": "eager"}  # the other implementations have no float64
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def _transformer(name: str, config: dict[str, Any], inputs: Callable[[], Inputs]) -> tuple[nn.Module, Inputs]:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config)), inputs()


_NAMES: list[tuple[Callable[[], Inputs], dict[str, Any], str]] = [
    (_text, _TEXT, "BertForMaskedLM RobertaForMaskedLM DistilBertForMaskedLM AlbertForMaskedLM ElectraForMaskedLM"),
    (_text, _TEXT, "DebertaForMaskedLM DebertaV2ForMaskedLM MPNetForMaskedLM ConvBertForMaskedLM FNetForMaskedLM"),
    (_text, _TEXT, "LongformerForMaskedLM BigBirdForMaskedLM NystromformerForMaskedLM RoFormerForMaskedLM"),
    (_text, _TEXT, "RemBertForMaskedLM ModernBertForMaskedLM EsmForMaskedLM XLMWithLMHeadModel LayoutLMForMaskedLM"),
    (_text, _TEXT, "GPT2LMHeadModel GPTNeoXForCausalLM GPTBigCodeForCausalLM OPTForCausalLM BloomForCausalLM"),
    (_text, _TEXT, "MptForCausalLM CTRLLMHeadModel OpenAIGPTLMHeadModel BioGptForCausalLM LlamaForCausalLM"),
    (_text, _TEXT, "MistralForCausalLM GemmaForCausalLM Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM"),
    (_text, _TEXT, "Qwen2ForCausalLM Qwen3ForCausalLM CohereForCausalLM OlmoForCausalLM StableLmForCausalLM"),
    (_text, _TEXT, "DiffLlamaForCausalLM JetMoeForCausalLM MambaForCausalLM RwkvForCausalLM Lfm2ForCausalLM"),
    (_text, _TEXT | _MOE | _EAGER, "MixtralForCausalLM Qwen2MoeForCausalLM OlmoeForCausalLM GptOssForCausalLM"),
    (
        _texts,
        _T5,
        "T5ForConditionalGeneration LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration",
    ),
    (_texts, _BART, "BartForConditionalGeneration MarianMTModel PegasusForConditionalGeneration"),
    (_texts, _BART, "M2M100ForConditionalGeneration NllbMoeForConditionalGeneration FSMTForConditionalGeneration"),
    (_image, _IMAGE, "ViTForImageClassification DeiTForImageClassification BeitForImageClassification"),
    (_image, _IMAGE, "Dinov2ForImageClassification DINOv3ViTModel SiglipVisionModel CLIPVisionModel"),
    (_image, _WINDOWS, "SwinForImageClassification Swinv2ForImageClassification"),
    (
        _image,
        _STAGES,
        "ConvNextForImageClassification ConvNextV2ForImageClassification PoolFormerForImageClassification",
    ),
    (_wave, _SPEECH, "Wav2Vec2ForCTC HubertForCTC WavLMForCTC UniSpeechSatForCTC SEWForCTC SEWDForCTC"),
    (_wave, _SPEECH, "Data2VecAudioForCTC Wav2Vec2ConformerForCTC"),
]
TRANSFORMERS: dict[str, Family] = {
    name: partial(_transformer, name, config, inputs) for inputs, config, names in _NAMES for name in names.split()
}


def _add(name: str, inputs: Callable[[], Inputs], config: dict[str, Any], **more: Any) -> None:
    TRANSFORMERS[name] = partial(_transformer, name, config | more, inputs)


_add("XLNetLMHeadModel", _text, {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48})
_add("FunnelForMaskedLM", _text, {"vocab_size": 64}, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48)
_add("GPTNeoForCausalLM", _text, _TEXT, num_layers=2, attention_types=[[["global", "local"], 1]])
_add("GPTJForCausalLM", _text, _TEXT, rotary_dim=8)
_add("FalconForCausalLM", _text, _WIDTHS | _MARKS)
_add(
    "DeepseekV3ForCausalLM",
    _text,
    _TEXT | _MOE | _EAGER | _LATENT,
    num_key_value_heads=4,
    n_routed_experts=4,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_add("Mamba2ForCausalLM", _text, _TEXT, num_heads=8, n_groups=1, state_size=8)
_add(
    "JambaForCausalLM",
    _text,
    _TEXT | _EAGER,
    attn_layer_period=2,
    attn_layer_offset=1,
    num_experts=2,
    use_mamba_kernels=False,
)
_add("RecurrentGemmaForCausalLM", _text, _TEXT, num_hidden_layers=3)
_add(
    "Qwen3NextForCausalLM",
    _text,
    _TEXT | _MOE | _EAGER,
    num_hidden_layers=4,
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
_add(
    "LevitForImageClassification",
    partial(_image, 64),
    {"image_size": 64},
    hidden_sizes=[16, 32, 32],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
)
_add("SegformerForImageClassification", _image, _STAGES, num_attention_heads=[1, 2, 2, 2])
_add("PvtV2ForImageClassification", partial(_image, 64), _STAGES, image_size=64, num_attention_heads=[1, 2, 2, 2])
_add("ResNetForImageClassification", partial(_image, 64), _STAGES, embedding_size=16)
_add("RegNetForImageClassification", partial(_image, 64), _STAGES, embedding_size=16, groups_width=8)
_add("MobileNetV2ForImageClassification", partial(_image, 64), {"depth_multiplier": 0.25})
_add(
    "FocalNetForImageClassification",
    partial(_image, 64),
    {
        "embed_dim": 16,
        "depths": [1, 1],
        "image_size": 64,
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "hidden_sizes": [16, 32],
    },
)
_add(
    "WhisperForConditionalGeneration",
    lambda: {"input_features": _floats(2, 16, 32), "decoder_input_ids": _tokens(2, 6)},
    _BART,
    num_mel_bins=16,
    max_source_positions=16,
    max_target_positions=16,
)
_add(
    "ASTForAudioClassification",
    lambda: {"input_values": _floats(2, 64, 16)},
    _WIDTHS,
    max_length=64,
    num_mel_bins=16,
    patch_size=8,
    frequency_stride=8,
    time_stride=8,
)
_add(
    "EncodecModel",
    lambda: {"input_values": _floats(2, 1, 160)},
    {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "upsampling_ratios": [4, 2], "num_lstm_layers": 1},
)
_add(
    "CLIPModel",
    lambda: _text() | _image(),
    {"text_config": _WIDTHS | _MARKS, "vision_config": _IMAGE, "projection_dim": 32},
)
_add(
    "PerceiverModel",
    lambda: {"inputs": _floats(2, 10, 16)},
    {
        "d_model": 16,
        "num_latents": 6,
        "d_latents": 32,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 2,
    },
)

# ---------------------------------------------------------------- timm


def _timm(name: str, size: int, options: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """A model by its name, or of a class "module.Class" where the name's function sets its sizes itself."""
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    module, _, cls = name.partition(".")
    make = getattr(importlib.import_module(f"timm.models.{module}"), cls) if cls else partial(timm.create_model, name)
    return make(num_classes=8, **options), {"x": _floats(2, 3, size, size)}


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
_SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
_FOUR, _WIDE, _THIN = {"depths": (1, 1, 1, 1)}, {"embed_dims": (32, 32, 32, 32)}, {"embed_dims": (16, 16, 32, 32)}
_CONVNEXT = _FOUR | {"dims": (16, 16, 32, 32)}
_TWINS = _FOUR | _WIDE | {"img_size": 64, "num_heads": (2, 2, 2, 2)}
_MIX = "mlp_mixer"
_MODELS: list[tuple[str, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", 32, _VIT),
    ("vit_base_patch16_siglip_224", 32, _VIT),
    ("vit_relpos_small_patch16_224", 32, _VIT),
    ("deit_tiny_distilled_patch16_224", 32, _VIT),
    ("beit_base_patch16_224", 32, _VIT),
    ("eva02_tiny_patch14_224", 32, _VIT),
    ("cait_xxs24_224", 32, _VIT),
    ("convit_tiny", 32, _VIT),
    ("samvit_base_patch16", 32, _VIT),
    ("naflexvit_base_patch16_gap", 64, {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    ("xcit_nano_12_p16_224", 32, _VIT | {"patch_size": 16}),
    (
        "tnt_s_patch16_224",
        32,
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 4},
    ),
    ("swin_tiny_patch4_window7_224", 32, _SWIN),
    ("swinv2_tiny_window8_256", 32, _SWIN),
    ("swinv2_cr_tiny_ns_224", 32, _SWIN),
    ("mlp_mixer.MlpMixer", 32, _MIXER),
    ("convnext_atto", 64, _CONVNEXT),
    ("convnextv2_atto", 64, _CONVNEXT),
    ("edgenext_xx_small", 64, _CONVNEXT),
    ("mambaout_femto", 64, _CONVNEXT),
    ("metaformer.MetaFormer", 64, _CONVNEXT),
    ("focalnet.FocalNet", 64, _FOUR | {"embed_dim": 16}),
    ("resnet10t", 64, {"channels": (16, 16, 32, 32)}),
    ("resnetv2_50", 64, {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)}),
    ("test_efficientnet", 64, {}),
    ("mobilenetv3_small_050", 64, {}),
    ("regnetx_002", 64, {}),
    ("densenet121", 64, {"block_config": (1, 1, 1, 1)}),
    ("dla46_c", 64, {}),
    ("ghostnet_050", 64, {}),
    ("starnet_s050", 64, {}),
    ("repvit_m0_9", 64, {"depth": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32)}),
    ("fastvit_t8", 64, {"layers": (1, 1, 1, 1)} | _THIN),
    ("swiftformer_xs", 64, {"layers": (1, 1, 1, 1)} | _THIN),
    ("mobilevit_xxs", 64, {}),
    ("efficientvit_m0", 64, {"img_size": 64}),
    ("visformer_tiny", 64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 32}),
    ("coat_lite_tiny", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1)} | _THIN),
    ("twins_svt_small", 64, _TWINS),
    ("twins_pcpvt_small", 64, _TWINS),
    ("pvt_v2_b0", 64, _FOUR),
    ("davit_tiny", 64, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)}),
    ("hiera_tiny_224", 64, {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 16}),
    ("sequencer2d_s", 32, {"img_size": 32, "layers": (1, 1, 1, 1), "hidden_sizes": (8, 8, 8, 8)} | _WIDE),
    ("inception_next_atto", 64, _FOUR),
]
TIMM: dict[str, Family] = {name: partial(_timm, name, size, options) for name, size, options in _MODELS}
