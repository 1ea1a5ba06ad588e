"""Folders of published models without weights: config.json with the sizes of the cards, and a processor.

``save("qwen3_vl_sft", folder)`` makes what the recipe of that name asks to be fetched. The processors have
the published settings and a small vocabulary of their own (tests/processors.py): tokens of pictures are as
published, those of text differ a little.
"""

from __future__ import annotations

from typing import Any

import processors
import transformers

IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _ids(processor: Any, *names: str) -> dict[str, int]:
    return {name: getattr(processor.tokenizer, name) for name in names}


def qwen3_vl_4b(processor: Any) -> Any:
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16}
    vision |= {"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]}
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **_ids(processor, *IDS)
    )


def internvl3_8b(processor: Any) -> Any:
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 151674}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "model_type": "qwen2"}
    return transformers.InternVLConfig(
        text_config=text, tie_word_embeddings=False, image_token_id=processor.image_token_id
    )


def smolvlm2_2b(processor: Any) -> Any:
    text = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 49280}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "model_type": "llama"}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    return transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=3, image_token_id=processor.image_token_id
    )


def minicpmv_4_6(processor: Any) -> Any:
    """SigLIP SO400M/14 and the class's own default language model; the card's sizes were not at hand."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "image_size": 980, "patch_size": 14}
    return transformers.MiniCPMV4_6Config(
        vision_config=vision, **_ids(processor, "image_token_id", "video_token_id")
    )


SMOLVLM = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
MODELS = {
    "qwen3_vl_sft": (qwen3_vl_4b, "qwen3_vl", {}),
    "qwen3_vl_lora": (qwen3_vl_4b, "qwen3_vl", {}),
    "internvl_sft": (internvl3_8b, "internvl", {}),
    "smolvlm_full": (smolvlm2_2b, "smolvlm", SMOLVLM),
    "minicpmv_sft": (minicpmv_4_6, "minicpmv4_6", {}),
}


def save(recipe: str, folder: Any) -> str:
    """The folder that a recipe's ``model.path`` names; its path."""
    config, family, settings = MODELS[recipe]
    processor = processors.make(family, **settings)
    if family == "smolvlm":
        processor.image_seq_len = 81  # (384 / 14 / 3)²
    processor.save_pretrained(folder)
    config(processor).save_pretrained(folder)
    return str(folder)
