"""Pixels against the reference's evaluation transform, and against Pillow."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_model import GOLDEN

from omnimodel import ImageProcessor
from omnimodel.processing import as_rgb

CASES = json.loads((GOLDEN / "transform/index.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_transform(case):
    name, size = case.split("@")
    image = PIL.Image.open(GOLDEN / "transform/images" / name)
    pixels = ImageProcessor(int(size))(image)
    expected = np.load(GOLDEN / "transform/expected.npz")
    half = int(size) // 2 - 16
    parts = {
        "crop_top_left_32": pixels[:, :32, :32],
        "crop_centre_32": pixels[:, half : half + 32, half : half + 32],
        "every_7th": pixels[:, ::7, ::7],
        "full_fp16": pixels,
    }
    compared = [part for part in parts if f"{case}/{part}" in expected]
    assert "every_7th" in compared
    for part in compared:
        reference = torch.from_numpy(expected[f"{case}/{part}"]).float()
        assert (parts[part] - reference).abs().max() < 0.04, part  # two steps of a byte
    mean = torch.tensor(CASES[case]["mean"])
    assert (pixels.mean(dim=(1, 2)) - mean).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(90, 300), (640, 480), (1000, 31)])
def test_resizing_is_pillow_s_even_for_noise(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ours = ImageProcessor(64).resize(noise).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(PIL.Image.fromarray(noise).resize((64, 64), PIL.Image.Resampling.BICUBIC)).astype(int)
    assert abs(ours - pillow).max() <= 3 and abs(ours - pillow).mean() < 0.3


def test_the_whole_image_is_squashed_not_cropped():
    ramp = np.tile(np.linspace(0, 255, 900, dtype=np.uint8)[None, :, None], (300, 1, 3))
    resized = ImageProcessor(30).resize(ramp)
    assert resized[:, :, 0].max() < 10 and resized[:, :, -1].min() > 245  # the training crop loses 55 % of it


def test_modes_lists_and_arrays():
    processor = ImageProcessor(16)
    gray = PIL.Image.new("L", (8, 8), 200)
    with_alpha = PIL.Image.new("RGBA", (8, 8), (200, 200, 200, 7))
    batch = processor([gray, with_alpha, np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), 200, np.uint8)])
    assert batch.shape == (4, 3, 16, 16)
    assert torch.equal(batch, batch[:1].expand_as(batch))
    assert processor([]).shape == (0, 3, 16, 16)
    same_size = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert torch.equal(processor.resize(same_size).permute(1, 2, 0), torch.from_numpy(same_size))


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.uint16), np.zeros((4, 4, 4), np.uint8), np.zeros(3, np.uint8)]
)
def test_what_is_no_8_bit_image_is_refused(bad):
    with pytest.raises(ValueError, match="convert 16-bit"):
        as_rgb(bad)
