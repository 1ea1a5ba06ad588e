"""Constant positions are resized once a grid, to the numbers that resizing them every time would give."""

import copy

import pytest
import torch
from test_vision import FAMILIES
from tiny_model import tiny_model
from tiny_recipe import MODEL, tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from omnimodel import OmniLMMConfig, vision
from pipelines.config import parse_recipe
from pipelines.model import build_model
from pipelines.parallel import start

LARGER = [(3, 3), (3, 4), (2, 2), (3, 3)]  # rows and columns of patches; the towers were built for 2 x 2


class Resizes(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "upsample_bicubic" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def towers(name):
    """The same tower frozen and, so that it always resizes, not."""
    torch.manual_seed(0)
    free = vision.build_vision_tower(name, FAMILIES[name]).eval()
    return copy.deepcopy(free).requires_grad_(False), free


def features(tower, grid):
    patch = tower.patch_embed.patch_size[0]
    images = torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(1))
    with Resizes() as resizes:
        found, found_grid = vision.patch_features(tower, images.to(tower.patch_embed.proj.weight.dtype))
    assert found_grid == grid
    return found.detach(), resizes.count


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_tower_resizes_once_a_grid_and_sees_the_same(name):
    frozen, free = towers(name)
    names = list(frozen.state_dict())
    counts = []
    for grid in LARGER:
        (ours, count), (theirs, every) = features(frozen, grid), features(free, grid)
        assert torch.equal(ours, theirs)
        counts.append((count, every))
    resized = int(free.pos_embed is not None)
    assert counts == [(resized, resized), (resized, resized), (0, 0), (0, resized)]
    assert list(frozen.state_dict()) == names and torch.equal(
        frozen.state_dict()["pos_embed"], free.state_dict()["pos_embed"]
    )
    assert frozen.patch_embed.grid_size == free.patch_embed.grid_size == (2, 2)


@pytest.mark.parametrize("how", ["loaded", "cast", "assigned"])
def test_other_weights_are_resized_anew(how):
    frozen, free = towers("vit_base_patch16_clip_224")
    features(frozen, (3, 3))
    for tower in (frozen, free):
        state = {n: x + 1.0 if n == "pos_embed" else x for n, x in tower.state_dict().items()}
        if how == "cast":
            tower.to(torch.bfloat16)
        else:
            tower.load_state_dict(state, assign=how == "assigned")
        tower.requires_grad_(tower is free)
    assert torch.equal(features(frozen, (3, 3))[0], features(free, (3, 3))[0])


def test_a_trained_tower_learns_its_positions_at_any_grid():
    _, free = towers("vit_base_patch16_clip_224")
    for _ in range(2):
        free.zero_grad()
        vision.patch_features(free, torch.randn(1, 3, 48, 48))[0].square().sum().backward()
        assert free.pos_embed.grad.abs().sum() > 0


def frozen_model():
    model = tiny_model(image_size=42).eval()
    model.model.vision_tower.requires_grad_(False)
    return model


def test_tower_and_resampler_resize_in_the_first_forward_alone():
    model, images = frozen_model(), torch.randint(0, 256, (2, 3, 42, 42), dtype=torch.uint8)
    counts, found = [], []
    for _ in range(3):
        with Resizes() as resizes:
            found.append(model.model.encode_images(images))
        counts.append(resizes.count)
    assert counts == [2, 0, 0] and torch.equal(found[0], found[2])
    before = found[0].detach()
    model.model.resampler.pos_embed.mul_(0.5)  # a buffer that is written to is another table
    assert not torch.allclose(model.model.encode_images(images), before)
    model.model.resampler.reset_buffers()
    assert torch.equal(model.model.encode_images(images), before)


@pytest.mark.slow
def test_compiled_as_a_whole_it_sees_the_same():
    model, images = frozen_model(), torch.randint(0, 256, (2, 3, 42, 42), dtype=torch.uint8)
    expected = model.model.encode_images(images)
    compiled = torch.compile(frozen_model().model.encode_images, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images), expected)


def test_under_fsdp_it_sees_the_same(tmp_path):
    tree = tiny_recipe("nowhere", tmp_path, run={"dtype": "bfloat16"}, model={"freeze": ["vision_tower"]})
    recipe, config = parse_recipe(tree), OmniLMMConfig(**MODEL | {"image_size": 48}, vocab_size=99)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with start(recipe) as world:
        tower = build_model(recipe, config, world).model.model.vision_tower
        pixels = vision.normalize(images, torch.bfloat16)
        free = copy.deepcopy(tower).requires_grad_(True)
        for _ in range(2):
            found = vision.patch_features(tower, pixels)[0]
            assert torch.equal(found, vision.patch_features(free, pixels)[0].detach())
