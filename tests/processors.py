"""Processors of current model families, made offline: each with a small home-made vocabulary.

``make("qwen3_vl")`` gives a processor with its family's chat template; ``save("qwen3_vl", folder)`` a folder
as a model's. Sizes are the published ones, or small ones (``small=True``) for tests that look at every pixel.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import part_templates
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

WORDS = "the and that image shows user assistant system a photo of in is was for with What This these two"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = [
    *CHATML,
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
MINICPM_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def tokenizer(special: list[str], names: dict[str, str], *, real: bool = False) -> Any:
    """A byte-level BPE tokenizer with these control tokens; ``real``: over Qwen's own vocabulary."""
    from transformers import PreTrainedTokenizerFast

    backend = _qwen_backend() if real else _tiny_backend()
    special = list(dict.fromkeys([*special, *names.values()]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {"eos_token": next(t for t in ("<|im_end|>", "<eos>", "</s>", "<|endoftext|>") if t in special)}
    named["pad_token"] = "<pad>" if "<pad>" in special else special[0]
    if "<bos>" in special:
        named["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=names, **named)


def _tiny_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    _byte_level(backend)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS] * 10, trainer)
    return backend


@cache
def _qwen_merges() -> tuple[Any, Any]:
    """Vocabulary and merges of the real Qwen tokenizer, which the package dashscope carries."""
    from importlib.util import find_spec

    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = os.path.join(os.path.dirname(find_spec("dashscope").origin), "resources", "qwen.tiktoken")
    return TikTokenConverter(vocab_file=path).extract_vocab_merges_from_model(path)


def _qwen_backend() -> Tokenizer:
    vocab, merges = _qwen_merges()
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    _byte_level(backend)
    return backend


def _byte_level(backend: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def minicpmv4_6(small: bool, **options: Any) -> Any:
    options |= {"scale_resolution": 112, "max_slice_nums": 4} if small else {}
    return _class("minicpmv4_6", "MiniCPMV4_6Processor")(
        image_processor=_class("minicpmv4_6", "MiniCPMV4_6ImageProcessor")(**options),
        video_processor=_class("minicpmv4_6", "MiniCPMV4_6VideoProcessor")(),
        tokenizer=tokenizer([*QWEN, "<unk>", "<|video|>"], MINICPM_NAMES, real=REAL),
        chat_template=part_templates.MINICPM_V,
    )


def qwen2_5_vl(small: bool, **options: Any) -> Any:
    options |= {"size": {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}} if small else {}
    return _class("qwen2_5_vl", "Qwen2_5_VLProcessor")(
        _class("qwen2_vl", "Qwen2VLImageProcessor")(**options),
        tokenizer(QWEN, QWEN_NAMES, real=REAL),
        _class("qwen2_vl", "Qwen2VLVideoProcessor")(),
        chat_template=part_templates.QWEN2_5_VL,
    )


def qwen3_vl(small: bool, **options: Any) -> Any:
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    if small:
        size = {"shortest_edge": 64 * 64, "longest_edge": 192 * 192}
    half = [0.5] * 3
    options = {"patch_size": 16, "size": size, "image_mean": half, "image_std": half, **options}
    return _class("qwen3_vl", "Qwen3VLProcessor")(
        _class("qwen2_vl", "Qwen2VLImageProcessor")(**options),
        tokenizer(QWEN, QWEN_NAMES, real=REAL),
        _class("qwen3_vl", "Qwen3VLVideoProcessor")(),
        chat_template=part_templates.QWEN3_VL,
    )


def internvl(small: bool, **options: Any) -> Any:
    side = 56 if small else 448
    options = {"size": {"height": side, "width": side}, "crop_to_patches": True, **options}
    options |= {"min_patches": 1, "max_patches": 4 if small else 12}
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return _class("internvl", "InternVLProcessor")(
        _class("got_ocr2", "GotOcr2ImageProcessor")(**options),
        tokenizer(CHATML, names, real=REAL),
        _class("internvl", "InternVLVideoProcessor")(),
        image_seq_length=4 if small else 256,
        chat_template=part_templates.INTERNVL,
    )


def llava_onevision(small: bool, **options: Any) -> Any:
    if small:
        pins = [[56 * a, 56 * b] for a in (1, 2, 3) for b in (1, 2, 3)]
        options |= {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": pins}
    return _class("llava_onevision", "LlavaOnevisionProcessor")(
        _class("llava_onevision", "LlavaOnevisionImageProcessor")(**options),
        tokenizer(CHATML, {"image_token": "<image>", "video_token": "<video>"}, real=REAL),
        _class("llava_onevision", "LlavaOnevisionVideoProcessor")(),
        num_image_tokens=16 if small else 729,
        vision_feature_select_strategy="full",
        chat_template=part_templates.LLAVA_ONEVISION,
    )


def smolvlm(small: bool, **options: Any) -> Any:
    sizes = (128, 64) if small else (2048, 512)
    options = {"size": {"longest_edge": sizes[0]}, "max_image_size": {"longest_edge": sizes[1]}} | options
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    return _class("smolvlm", "SmolVLMProcessor")(
        _class("smolvlm", "SmolVLMImageProcessor")(**options),
        tokenizer([*CHATML, *rows], names, real=REAL),
        _class("smolvlm", "SmolVLMVideoProcessor")(),
        image_seq_len=4 if small else 64,
        chat_template=part_templates.SMOLVLM,
    )


def gemma3(small: bool, **options: Any) -> Any:
    side = 56 if small else 896
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    return _class("gemma3", "Gemma3Processor")(
        _class("gemma3", "Gemma3ImageProcessor")(**{"size": {"height": side, "width": side}, **options}),
        tokenizer(special, names, real=REAL),
        image_seq_length=4 if small else 256,
        chat_template=part_templates.GEMMA3,
    )


def pixtral(small: bool, **options: Any) -> Any:
    size = {"longest_edge": 112 if small else 1540}
    special = ["<pad>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG_BREAK]", "[IMG_END]"]
    options = {"size": size, "patch_size": {"height": 14, "width": 14}, **options}
    return _class("pixtral", "PixtralProcessor")(
        _class("pixtral", "PixtralImageProcessor")(**options),
        tokenizer(special, {"image_token": "[IMG]"}, real=REAL),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=part_templates.PIXTRAL,
    )


def lfm2_vl(small: bool, **options: Any) -> Any:
    if small:
        options |= {"tile_size": 64, "min_tiles": 2, "max_tiles": 4, "min_image_tokens": 4}
        options |= {"max_image_tokens": 16, "encoder_patch_size": 16, "downsample_factor": 2}
        options |= {"max_num_patches": 64}
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    tiles = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)]
    return _class("lfm2_vl", "Lfm2VlProcessor")(
        _class("lfm2_vl", "Lfm2VlImageProcessor")(**options),
        tokenizer([*CHATML, "<bos>", *tiles], names, real=REAL),
        chat_template=part_templates.LFM2_VL,
    )


REAL = False  # whether tokenizers have Qwen's real vocabulary
FAMILIES = {
    make_one.__name__: make_one
    for make_one in (
        *(minicpmv4_6, qwen2_5_vl, qwen3_vl, internvl, llava_onevision),
        *(smolvlm, gemma3, pixtral, lfm2_vl),
    )
}


def make(family: str, *, small: bool = False, **options: Any) -> Any:
    """The family's processor."""
    return FAMILIES[family](small, **options)


def save(family: str, folder: Any, *, small: bool = False, **options: Any) -> str:
    """A folder with the family's processor, as a model's; its path."""
    make(family, small=small, **options).save_pretrained(folder)
    return str(folder)


def save_model(family: str, folder: Any, **options: Any) -> str:
    """The same with a config.json beside it, as a model's folder has: for positions."""
    import transformers

    processor = make(family, small=True, **options)
    processor.save_pretrained(folder)
    text = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    named = processor.tokenizer
    ids = {
        name: getattr(named, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        if hasattr(named, name)
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config={"depth": 1}, **ids)
    elif family == "qwen2_5_vl":
        text |= {"rope_parameters": rope}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1}, **ids)
    else:
        config = transformers.InternVLConfig(text_config={**text, "model_type": "qwen2"})
    config.save_pretrained(folder)
    return str(folder)
