"""Kinds of classes and processors that no family of the other tests shows."""

from __future__ import annotations

import importlib

import processors
import pytest
import torch
from torch import nn

from omnidata.loader import PackLoader
from omnidata.loader.processor_pixels import as_numpy_has
from omnidata.profiles.processor import ProcessorProfile
from omnidata.schema import UserError
from omnimodel.packed import BOUNDS, class_for, config_of
from omnimodel.parts import image_tower
from pipelines.data import model_inputs
from pipelines.isolation import refusing

OVIS2 = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


def of(module, name, **arguments):
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)(**arguments)


def tokenizer_with(names, *more):
    return processors.tokenizer([*processors.CHATML, *more], names)


def square(side):
    return {"size": {"height": side, "width": side}}


@pytest.fixture(scope="module")
def model(family):
    folder = str(family("qwen3_vl") / "model")
    return class_for(config := config_of(folder)).from_pretrained(folder, config=config)


def test_features_may_stand_at_another_token_than_the_one_that_processors_name():
    """Ovis2's and Llama 4's: their ``image_token`` is what templates print, and a run is of others."""
    tokenizer = tokenizer_with({"image_token": "<image>"}, *OVIS2)
    images = of("ovis2", "Ovis2ImageProcessor", **square(56), min_patches=1, max_patches=4)
    processor = of("ovis2", "Ovis2Processor", image_processor=images, tokenizer=tokenizer, image_seq_length=4)
    profile = ProcessorProfile(processor)
    atom = tokenizer.convert_tokens_to_ids("<IMG_ATOM>")
    assert profile.image_token_ids == (atom,) and profile.feature_id == atom
    assert profile.runs(((64, 48),))[0].num_pixels > 0


def test_a_processor_may_name_no_id_for_its_image_token():
    tokenizer = tokenizer_with({"image_token": "<placeholder>", "boi_token": "<begin>", "eoi_token": "<end>"})
    images = of("janus", "JanusImageProcessor", **square(56))
    processor = of(
        "janus", "JanusProcessor", image_processor=images, tokenizer=tokenizer, num_image_tokens=16
    )
    placeholder = tokenizer.convert_tokens_to_ids("<placeholder>")
    assert ProcessorProfile(processor).image_token_ids == (placeholder,)


@pytest.mark.parametrize(
    ("module", "name", "names", "words"),
    [
        ("got_ocr2", "GotOcr2", {"img_start": "<img>", "img_end": "</img>"}, "Nested images are only"),
        ("mllama", "Mllama", {}, "does not say which text replaces"),
    ],
)
def test_a_processor_that_cannot_be_asked_is_refused_in_a_line(module, name, names, words):
    tokenizer = tokenizer_with({"image_token": "<|image|>", **names}, "<imgpad>", "<bos>")
    images = of(module, f"{name}ImageProcessor", **square(64))
    processor = of(module, f"{name}Processor", image_processor=images, tokenizer=tokenizer)
    with pytest.raises(UserError, match=words) as error:
        ProcessorProfile(processor)
    assert "cannot be asked what stands for a picture" in str(error.value)
    assert "\n" not in str(error.value)


def test_pixels_that_numpy_has_no_numbers_for_are_float32():
    half = torch.tensor([0.5, -1.25], dtype=torch.bfloat16)
    assert as_numpy_has(half).numpy().tolist() == [0.5, -1.25]
    for kept in (torch.tensor([1.5]), torch.tensor([3], dtype=torch.uint8)):
        assert as_numpy_has(kept) is kept


def test_norms_over_a_batch_keep_their_statistics(model):
    """FastVLM's tower has them: the documents of a pack would be seen in each other's mean."""
    tower = image_tower(model)
    tower.norm_of_a_batch = nn.BatchNorm2d(3)
    try:
        assert model.train().training and tower.training
        assert not tower.norm_of_a_batch.training
        assert not model.eval().training
    finally:
        del tower.norm_of_a_batch


def test_a_tower_is_not_told_where_documents_of_text_begin(model, family):
    """Kimi's takes its own bounds under those names, beside all that it is given."""
    seen = []
    tower = image_tower(model)
    hook = tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        [pack] = PackLoader(family("qwen3_vl") / "data", global_batch=1, max_tokens=4096, num_epochs=1)
        inputs = model_inputs(pack, torch.device("cpu"))
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], **dict.fromkeys(BOUNDS, 1))
    finally:
        hook.remove()
    assert [set(keywords) for keywords in seen] == [{"grid_thw"}]


def test_what_a_class_raises_refuses_it_and_says_where():
    words = r"Any cannot be trained on packs: .*size mismatch.* \(RuntimeError, test_other_families.py:"
    with pytest.raises(UserError, match=words), refusing("Any"):
        torch.ones(2, 3) @ torch.ones(4)
    with pytest.raises(torch.OutOfMemoryError), refusing("Any"):
        raise torch.OutOfMemoryError("full")
