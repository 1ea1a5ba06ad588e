"""Tiny random models of current families, for the small processors of ``processors``.

``config("qwen3_vl", processor)`` is a configuration; ``save("qwen3_vl", folder)`` writes a model's folder:
weights, processor and config.json, as it would come from a hub.
"""

from __future__ import annotations

from typing import Any

import processors
import torch
import transformers

MODELS = (
    *("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm", "pixtral"),
    *("minicpmv4_6", "lfm2_vl", "gemma3"),
)
ONLY_ATTENTION = MODELS[:6]
TEXT = {
    **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096},
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {
    **VISION,
    "model_type": "siglip_vision_model",
    "patch_size": 14,
    "vision_use_head": False,
    "image_size": 56,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _text(**changes: Any) -> dict[str, Any]:
    """A text configuration; ``head_dim=None`` leaves the width of a head to the class."""
    merged = TEXT | changes
    return {name: value for name, value in merged.items() if value is not None}


def _ids(processor: Any, *names: str) -> dict[str, int]:
    return {name: getattr(processor.tokenizer, name) for name in names}


def qwen2_5_vl(processor: Any) -> Any:
    named = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(head_dim=None, rope_parameters=ROPE),
        vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        **_ids(processor, *named),
    )


def qwen3_vl(processor: Any) -> Any:
    named = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 16, "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1]}
    return transformers.Qwen3VLConfig(
        text_config=_text(num_hidden_layers=3, rope_parameters={**ROPE, "mrope_interleaved": True}),
        vision_config=vision,
        **_ids(processor, *named),
    )


def internvl(processor: Any) -> Any:
    return transformers.InternVLConfig(
        text_config=_text(head_dim=None, model_type="qwen2"),
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )


def llava_onevision(processor: Any) -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=_text(head_dim=None, model_type="qwen2"),
        vision_config=SIGLIP,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
    )


def smolvlm(processor: Any) -> Any:
    return transformers.SmolVLMConfig(
        text_config=_text(model_type="llama"),
        vision_config={**VISION, "image_size": 64, "patch_size": 16},
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )


def pixtral(processor: Any) -> Any:
    return transformers.Mistral3Config(
        text_config=_text(model_type="mistral", sliding_window=16),
        vision_config={**VISION, "model_type": "pixtral", "patch_size": 14, "image_size": 112},
        image_token_id=processor.image_token_id,
        spatial_merge_size=2,
    )


def minicpmv4_6(processor: Any) -> Any:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    linear |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
    rope = {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    kinds = ["linear_attention", "full_attention"]
    text = _text(model_type="qwen3_5_text", layer_types=kinds, rope_parameters=rope, **linear)
    vision = {**VISION, "num_hidden_layers": 3, "patch_size": 14, "image_size": 980, "insert_layer_id": 1}
    return transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=vision,
        insert_layer_id=1,
        **_ids(processor, "image_token_id", "video_token_id"),
    )


def lfm2_vl(processor: Any) -> Any:
    kinds = ["conv", "full_attention", "conv"]
    return transformers.Lfm2VlConfig(
        text_config=_text(
            head_dim=None,
            model_type="lfm2",
            num_hidden_layers=3,
            layer_types=kinds,
            block_auto_adjust_ff_dim=False,
        ),
        vision_config={
            **VISION,
            **{
                "model_type": "siglip2_vision_model",
                "patch_size": 16,
                "num_patches": 64,
                "vision_use_head": False,
            },
        },
        image_token_id=processor.image_token_id,
        downsample_factor=2,
        projector_hidden_size=64,
    )


def gemma3(processor: Any) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3Config(
        text_config=_text(
            num_hidden_layers=3, sliding_window=16, layer_types=kinds, query_pre_attn_scalar=16
        ),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=processor.tokenizer.boi_token_id,
        eoi_token_index=processor.tokenizer.eoi_token_id,
        image_token_id=processor.tokenizer.image_token_id,
    )


def config(family: str, processor: Any) -> Any:
    """A tiny model's configuration; ids of ends from the processor's tokenizer."""
    made = globals()[family](processor)
    text = made.get_text_config()
    text.eos_token_id, text.pad_token_id = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    return made


def save(family: str, folder: Any, *, seed: int = 0) -> str:
    """A model's folder with random weights, wide enough that differences show; its path."""
    processor = processors.make(family, small=True)
    processor.save_pretrained(folder)
    made = config(family, processor)
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(made)]
    torch.manual_seed(seed)
    model = kind(made)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return str(folder)
