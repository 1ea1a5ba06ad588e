"""What the loader does to pictures: augmentation, seeded per sample and epoch, and the square's fit."""

import numpy as np
import pytest
import torch
from test_loader import loader

from omnidata.loader.augment import Augment
from omnidata.schema import UserError


def test_augmentation_depends_on_seed_epoch_and_key_alone(tiny_dataset):
    def images(**settings) -> dict[str, torch.Tensor]:
        settings = {"global_batch": 1, "augment": {"crop": 0.3, "brightness": 0.2}} | settings
        found = {}
        for microbatch in loader(tiny_dataset, **settings):
            if len(microbatch.images):
                found[microbatch.keys, microbatch.epoch] = microbatch.images.clone()
        return found

    plain, one, again = images(augment=None), images(), images(num_workers=2)
    assert one.keys() == again.keys()
    assert all(torch.equal(one[keys], again[keys]) for keys in one)
    assert sum(torch.equal(one[keys], plain[keys]) for keys in one) == 0


def test_augment_changes_with_epoch_and_refuses_nonsense(tiny_dataset):
    rgb = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    change = Augment(crop=0.5)
    one, other = (change.apply(rgb, seed=0, epoch=epoch, key="a") for epoch in (0, 1))
    assert one.shape != other.shape and min(one.shape[:2]) >= 15
    assert np.array_equal(Augment().apply(rgb, seed=0, epoch=0, key="a"), rgb)
    assert Augment(brightness=0.5).apply(rgb, seed=0, epoch=0, key="a").dtype == np.uint8
    with pytest.raises(UserError, match=r"augment\.crop"):
        Augment(crop=1.5)
    with pytest.raises(UserError, match="mirror"):
        loader(tiny_dataset, augment={"mirror": True})


def test_colours_rotation_and_flip_change_what_they_say_and_no_more():
    rng = np.random.default_rng(0)
    rgb = rng.integers(40, 200, (24, 24, 3), dtype=np.uint8)
    gray = np.repeat(rgb[..., :1], 3, axis=2)
    for change in (Augment(saturation=0.9), Augment(hue=0.4)):
        changed = change.apply(rgb, seed=1, epoch=0, key="a")
        assert np.abs(changed.astype(int) - rgb).max() > 5
        assert np.abs(change.apply(gray, seed=1, epoch=0, key="a").astype(int) - gray).max() <= 1
    with pytest.warns(UserWarning, match="left and right"):
        flip = Augment(flip=1.0)
    assert np.array_equal(flip.apply(rgb, seed=0, epoch=0, key="a"), rgb[:, ::-1])
    turned = Augment(rotation=30.0).apply(rgb, seed=0, epoch=0, key="a")
    assert turned.shape == rgb.shape and not np.array_equal(turned, rgb)
    assert np.array_equal(turned, Augment(rotation=30.0).apply(rgb, seed=0, epoch=0, key="a"))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
def test_the_loader_s_centre_is_the_processor_s(shape):
    from omnidata.images.pixels import fit_rgb
    from omnimodel import ImageProcessor

    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for fit in ("squash", "center_crop"):
        expected = ImageProcessor(32, fit).resize(rgb).permute(1, 2, 0).numpy()
        assert np.array_equal(fit_rgb(rgb, 32, fit=fit), expected)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    centre = rgb[top : top + side, left : left + side]
    assert np.array_equal(fit_rgb(rgb, side, fit="center_crop"), centre)
