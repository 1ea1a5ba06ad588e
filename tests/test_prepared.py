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
from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS
from omnidata.text.encoder import encoder_of
from omnidata.text.preparation import prepare_tokenizer
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
    check_same(ours, theirs)
    for name in ("bos_token", "eos_token", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(theirs)


def configure(folder, **change):
    """The golden tokenizer's folder with other values in its configuration."""
    shutil.copytree(golden_tokenizer_folder(), folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | change))
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def check_same(ours, theirs):
    for see in (fingerprint, template_fingerprint, special_token_ids, len):
        assert see(ours) == see(theirs)
    for name in ("special_tokens_map", "added_tokens_encoder"):
        assert getattr(ours, name) == getattr(theirs, name)


def as_published(folder):
    """A class of its own, flags of tokens, and what old releases wrote."""
    added = configure(folder)
    flags = {str(token.pop("id")): token for token in added}
    more = [token["content"] for token in added if token["special"]]
    named = {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    names = {"added_tokens_decoder": flags, "additional_special_tokens": more}
    configure(folder, **named, **names, add_bos_token=True, add_prefix_space=None)


def with_a_legacy_map(folder):
    configure(folder, unk_token=None, tokenizer_class="LlamaTokenizer")
    names = {"unk_token": {"content": "<unk>", "lstrip": False}, "cls_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def without_configuration(folder):
    configure(folder)
    (folder / "tokenizer_config.json").unlink()


def without_post_processor(folder):
    configure(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))


FOLDERS = [as_published, with_a_legacy_map, without_configuration, without_post_processor]


@pytest.mark.parametrize("write", FOLDERS)
def test_folders_of_other_classes_need_no_transformers(tmp_path, write):
    write(tmp_path / "a")
    ours = load_prepared(tmp_path / "a")
    check_same(ours, load_tokenizer(tmp_path / "a"))
    ours.save_pretrained(tmp_path / "b")
    saved = load_tokenizer(tmp_path / "b")
    check_same(ours, saved)
    check_same(load_prepared(tmp_path / "b"), saved)
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    if (tmp_path / "a" / "tokenizer_config.json").exists():
        assert config["tokenizer_class"] == "TokenizersBackend" and "auto_map" not in config


def test_tokens_are_added_as_prepare_tokenizer_adds_them(tmp_path):
    tokenizer = byte_level_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path / "a")
    state = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    ours = {*IMAGE_TOKENS, *CONTENT_TOKENS}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in ours]
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(state))
    added = load_prepared(tmp_path / "a").with_special_tokens(IMAGE_TOKENS + CONTENT_TOKENS)
    check_same(added, prepare_tokenizer(tmp_path / "a", tmp_path / "b"))
    added.save_pretrained(tmp_path / "c")
    check_same(load_tokenizer(tmp_path / "c"), added)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens_decoder": {"2": {"content": "</s>", "lstrip": True, "special": True}}},
        {"added_tokens_decoder": {"7": {"content": "</s>", "special": True}}},
        {"tokenizer_class": "X", "additional_special_tokens": ["of"]},
        {"image_token": "<im_patch>"},
        {"extra_special_tokens": {"image_token": "<im_patch>"}},
        {"extra_special_tokens": ["<not there yet>"]},
        {"pad_token": "<pad>"},
        {"fix_mistral_regex": True},
        {"chat_template": [{"name": "default", "template": "x"}]},
    ],
)
def test_what_transformers_would_change_is_left_to_it(tmp_path, change):
    configure(tmp_path, **change)
    assert load_prepared(tmp_path) is None


HEAVY = """
import sys
def heavy():
    return [name for name in ("torch", "transformers", "pandas") if name in sys.modules]
"""


def test_a_build_loads_neither_torch_nor_transformers(tmp_path):
    """In the process that does all of it: reading, rendering, shrinking, writing."""
    corpus = write_corpus(tmp_path / "c", num_llava=12, num_chat=4, bad=False)
    code = f"""{HEAVY}
import importlib
from omnidata.start import worker_imports
for name in worker_imports():
    importlib.import_module(name)
from omnidata.builder.build import build
from omnidata.builder.settings import BuildSettings, RunOptions
settings = BuildSettings({corpus.settings.source!r}, {golden_tokenizer_folder()!r},
    image_root={corpus.settings.image_root!r}, num_query=4, image_size=32)
report = build(settings, {str(tmp_path / "d")!r}, RunOptions(executor="inline", quiet=True))
assert report.num_samples == 16 and report.num_images
print(heavy())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_commands_load_neither_torch_nor_transformers(tmp_path):
    """With a tokenizer of a class of its own, whose image tokens are added."""
    corpus = write_corpus(tmp_path / "c", num_llava=6, num_chat=2, bad=False)
    byte_level_tokenizer("chatml").save_pretrained(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    data = str(tmp_path / "d")
    build = ["build-shards", *corpus.settings.source, "--tokenizer", str(tmp_path / "t"), "--out", data]
    build += ["--image-root", str(corpus.settings.image_root), "--workers", "1"]
    commands = [build, *([name, data] for name in ("inspect", "plan", "verify"))]
    code = f"""{HEAVY}
from omnidata.cli import main
for arguments in {commands!r}:
    sys.argv = ["omnidata", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    print("heavy:", heavy())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.count("heavy: []") == 4, (result.stdout, result.stderr)


def test_workers_find_the_tokenizer_that_their_server_has_read(tmp_path):
    byte_level_tokenizer("chatml").save_pretrained(tmp_path / "a")
    load_prepared(tmp_path / "a").save_pretrained(tmp_path / "b")
    code = f"""
import os
from omnidata.start import TOKENIZER
os.environ[TOKENIZER] = {str(tmp_path / "a")!r}
import omnidata.builder.warm
from omnidata.text import prepared
[held] = prepared._BACKENDS.values()
print(prepared.load_prepared({str(tmp_path / "b")!r}).backend_tokenizer is held)
from omnidata.render import Renderer
from omnidata.text import encoder
[(_, _, made)] = encoder._LAST
print(Renderer(prepared.load_prepared({str(tmp_path / "b")!r}))._encoder is made)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True"], result.stderr


@pytest.mark.slow
def test_workers_need_not_import_the_processor_that_their_server_has_loaded(tmp_path):
    from tiny_families import save

    code = f"""
import os, sys
from omnidata.start import MODEL
os.environ[MODEL] = {save("qwen3_vl", tmp_path / "model")!r}
import omnidata.builder.warm
before = set(sys.modules)
from omnidata.profiles.folder import load_processor
load_processor(os.environ[MODEL])
print(sorted(name for name in set(sys.modules) - before if name.startswith("transformers.models")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_pandas_is_kept_out_for_a_moment_only():
    pytest.importorskip("pandas")
    code = f"""{HEAVY}
import omnidata.without_pandas
import pyarrow
table = pyarrow.table({{"a": [1, 2]}})
print(heavy(), table.to_pandas().a.tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[] [1, 2]", result.stderr


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


def test_an_empty_name_of_a_token_is_left_to_transformers(tmp_path):
    configure(tmp_path, pad_token="")
    assert load_prepared(tmp_path) is None
    configure(tmp_path, pad_token=None)
    assert load_prepared(tmp_path) is not None


def test_a_process_makes_one_encoder_of_a_prepared_tokenizer():
    folder = golden_tokenizer_folder()
    first, again = (load_prepared(folder) for _ in range(2))
    encoder = encoder_of(first, content_tokens=["<box>", "<ref>"])
    assert encoder_of(again, content_tokens=["<ref>", "<box>", "<box>"]) is encoder
    assert encoder_of(again, content_tokens=["<box>"]) is not encoder
    other = again.with_special_tokens(["<added>"])
    assert "<added>" in encoder_of(other, content_tokens=["<box>"]).guards
    assert "<added>" not in encoder_of(again, content_tokens=["<box>"]).guards
    loaded = load_tokenizer(folder)
    assert encoder_of(loaded, content_tokens=[]) is not encoder_of(loaded, content_tokens=[])
