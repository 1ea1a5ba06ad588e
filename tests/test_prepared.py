"""Building without torch and transformers: the same ids, names and pixels, in processes that load neither."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from throwaway import TEMPLATES, byte_level_tokenizer, golden_tokenizer_folder
from tiny_corpus import write_corpus

from omnidata.images.pixels import resize_rgb
from omnidata.images.shrink import shrink_rgb
from omnidata.text.prepared import load_prepared
from omnidata.text.tokenizer import fingerprint, load_tokenizer, special_token_ids, template_fingerprint


@pytest.fixture(scope="module", params=["golden", *TEMPLATES])
def folder(request, tmp_path_factory):
    if request.param == "golden":
        return golden_tokenizer_folder()
    path = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer(request.param).save_pretrained(path)
    return path


def test_a_prepared_tokenizer_is_what_transformers_loads(folder, tmp_path):
    ours, theirs = load_prepared(folder), load_tokenizer(folder)
    for see in (fingerprint, template_fingerprint, special_token_ids, len):
        assert see(ours) == see(theirs)
    for name in ("special_tokens_map", "added_tokens_encoder", "bos_token", "eos_token", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"add_bos_token": True},
        {"added_tokens_decoder": {"2": {"content": "</s>", "lstrip": True, "special": True}}},
        {"extra_special_tokens": ["<not there yet>"]},
        {"pad_token": "<pad>"},
        {"fix_mistral_regex": True},
        {"chat_template": [{"name": "default", "template": "x"}]},
    ],
)
def test_what_transformers_would_change_is_left_to_it(tmp_path, change):
    shutil.copytree(golden_tokenizer_folder(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    assert load_prepared(tmp_path) is None


def test_a_build_loads_neither_torch_nor_transformers(tmp_path):
    """In the process that does all of it: reading, rendering, shrinking, writing."""
    corpus = write_corpus(tmp_path / "c", num_llava=12, num_chat=4, bad=False)
    code = f"""
import sys
from omnidata.builder.driver import build
from omnidata.builder.settings import BuildSettings, RunOptions
settings = BuildSettings({corpus.settings.source!r}, {golden_tokenizer_folder()!r},
    image_root={corpus.settings.image_root!r}, num_query=4, image_size=32)
report = build(settings, {str(tmp_path / "d")!r}, RunOptions(executor="inline", quiet=True))
assert report.num_samples == 16 and report.num_images
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("scale", [0.07, 0.5, 0.93])
def test_shrinking_for_storage_hardly_differs_from_trainings_resize(scale):
    photo = np.asarray(Image.effect_noise((301, 200), 60).resize((602, 400), Image.Resampling.BICUBIC))
    rgb = np.ascontiguousarray(np.stack([photo, photo[::-1], photo[:, ::-1]], axis=2))
    width, height = max(1, round(602 * scale)), max(1, round(400 * scale))
    for extent in (None, (601.5, 399.5)):
        ours = shrink_rgb(rgb, width, height, extent=extent)
        exact = resize_rgb(rgb, width, height, extent=extent)
        off = np.abs(ours.astype(int) - exact)
        assert ours.shape == exact.shape and off.mean() < 0.4 and off.max() <= 16


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_shrinking_to_a_pixel(size):
    rgb = np.full((90, 60, 3), 200, np.uint8)
    assert (shrink_rgb(rgb, *size) == 200).all()
    out = np.zeros((size[1], size[0], 3), np.uint8)
    assert shrink_rgb(rgb, *size, out=out) is out and (out == 200).all()
