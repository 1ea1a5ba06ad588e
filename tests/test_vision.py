"""Towers of every family, run as the original runs its own."""

import math

import pytest
import timm
import torch
from tiny_model import tiny_model
from torch import nn

from omnimodel import ImageProcessor, OmniLMMConfig, vision
from omnimodel.resampler import sincos_table

SMALL = {"img_size": 28, "embed_dim": 64, "depth": 3, "num_heads": 2}
FAMILIES = {
    "eva02_enormous_patch14_clip_224": SMALL,  # the original's: post norm, no rotary
    "eva02_tiny_patch14_224": SMALL,  # rotary, SwiGLU, average pooling
    "vit_base_patch16_clip_224": SMALL | {"img_size": 32},  # OpenAI's CLIP: norm before the blocks
    "vit_base_patch16_siglip_224": SMALL | {"img_size": 32},  # attention pooling, no prefix token
    "vit_small_patch14_reg4_dinov2": SMALL,  # registers
}


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(full timm model, our tower with its weights)."""
    torch.manual_seed(0)
    kwargs = FAMILIES[request.param]
    full = timm.create_model(request.param, num_classes=0, dynamic_img_size=True, **kwargs).eval()
    tower = vision.build_vision_tower(request.param, kwargs).eval()
    weights = full.state_dict()
    dropped = vision.dropped_names(list(weights), tower)
    tower.load_state_dict({name: weights[name] for name in weights if name not in dropped}, strict=True)
    assert any(name.startswith("blocks.2.") for name in dropped)
    return full, tower


def test_features_are_the_second_to_last_block_s_through_the_final_norm(pair):
    full, tower = pair
    outputs = []
    full.blocks[-2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    size = full.patch_embed.img_size[0]
    images = torch.randn(2, 3, size, size)
    full.forward_features(images)
    features, grid = vision.patch_features(tower, images)
    torch.testing.assert_close(features, full.norm(outputs[0])[:, full.num_prefix_tokens :])
    assert grid == (2, 2) and features.shape == (2, 4, tower.num_features)


def test_any_image_size_gives_its_own_grid(pair):
    _, tower = pair
    patch = tower.patch_embed.patch_size[0]
    features, grid = vision.patch_features(tower, torch.randn(1, 3, 3 * patch, 4 * patch - 5))
    assert grid == (3, 4) and features.shape[1] == 12


def test_gradients_reach_every_parameter(pair):
    """A parameter that takes no part would make DDP wait for its gradient for ever."""
    _, tower = pair
    size = tower.patch_embed.img_size[0]
    vision.patch_features(tower, torch.randn(2, 3, size, size))[0].square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_unsaved_buffers_come_back_after_a_build_on_the_meta_device(pair):
    _, tower = pair
    size = tower.patch_embed.img_size[0]
    images = torch.randn(1, 3, size, size)
    expected, _ = vision.patch_features(tower, images)
    weights = tower.state_dict()
    tower.to("meta").to_empty(device="cpu")
    for buffer in tower.buffers():
        buffer.fill_(torch.nan)  # what to_empty leaves is anything
    tower.load_state_dict(weights)
    vision.reset_tower_buffers(tower)
    torch.testing.assert_close(vision.patch_features(tower, images)[0], expected)


def test_parameters_born_on_the_meta_device_get_a_sensible_start():
    with torch.device("meta"):
        tower = vision.build_vision_tower("vit_small_patch14_reg4_dinov2", SMALL)
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in tower.modules():
        vision.init_tower_module(module)
    by_name = dict(tower.named_parameters())
    assert by_name["cls_token"].std() < 0.1
    born_on_cpu = vision.build_vision_tower("vit_small_patch14_reg4_dinov2", SMALL).pos_embed
    positions = by_name["pos_embed"]
    table = sincos_table(math.isqrt(positions.shape[1]), positions.shape[2])
    for tower_positions in (
        positions,
        born_on_cpu,
    ):  # however it was born
        torch.testing.assert_close(tower_positions[0, -len(table) :], table)
    assert by_name["blocks.0.ls1.gamma"].isfinite().all()


def test_bytes_are_normalised_like_clip():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (vision.CLIP_MEAN, vision.CLIP_STD))
    torch.testing.assert_close(vision.normalize(images), (images / 255 - mean) / std)
    floats = torch.randn(1, 3, 4, 4)
    assert torch.equal(vision.normalize(floats), floats)
    assert vision.normalize(images, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["resnet18", "no_such_model"])
def test_what_is_no_vit_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        vision.build_vision_tower(name)


def test_towers_are_fed_as_they_were_trained():
    assert vision.statistics_of("vit_so400m_patch14_siglip_384") == ([0.5] * 3, [0.5] * 3)
    assert vision.statistics_of("vit_base_patch16_siglip_224.webli")[0] == [0.5] * 3
    assert vision.statistics_of("vit_large_patch14_dinov2.lvd142m")[0] == [0.485, 0.456, 0.406]
    for name in ("eva02_enormous_patch14_clip_224.laion2b_plus", "eva02_enormous_patch14_clip_224"):
        assert vision.statistics_of(name) == (list(vision.CLIP_MEAN), list(vision.CLIP_STD))


def test_a_model_normalises_with_its_own_statistics():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    model = tiny_model(image_mean=[0.5] * 3, image_std=[0.25] * 3).eval()
    floats = ImageProcessor(28, image_mean=[0.5] * 3, image_std=[0.25] * 3).normalize(images)
    with torch.no_grad():
        torch.testing.assert_close(model.model.encode_images(images), model.model.encode_images(floats))
        assert not torch.allclose(
            model.model.encode_images(images), tiny_model().eval().model.encode_images(images)
        )
    assert OmniLMMConfig.from_dict(model.config.to_dict()).image_mean == [0.5] * 3
