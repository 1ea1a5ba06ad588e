"""Large pictures cut into tiles: published grids, exact tiles, honest lengths, the same at inference."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from throwaway import golden_tokenizer_folder
from tiny_corpus import Corpus, digests, killed_at
from tiny_dataset import make_jpeg, write_tokenizer
from tiny_recipe import tiny_recipe, write_recipe

from omnidata import Dataset, PackLoader
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.images.pixels import decode_rgb, resize_rgb
from omnidata.images.slices import Slicing, choose_grid, cut_tiles, read_picture, slicing_of
from omnidata.inspect.samples import read_views
from omnidata.render import Renderer
from omnidata.schema import (
    INDEX,
    MANIFEST,
    SLICE_TOKENS,
    Conversation,
    ImagePart,
    Message,
    TextPart,
    UserError,
)
from omnidata.text.preparation import prepare_tokenizer
from omnidata.text.tokenizer import fingerprint, load_tokenizer
from omnidata.verify.repair import repair
from omnidata.verify.run import verify
from pipelines.config import load_recipe
from pipelines.evaluate import load_for_answers
from pipelines.evaluate import main as evaluate
from pipelines.generate import Answerer
from pipelines.train import train

INLINE = RunOptions(executor="inline", quiet=True)
SIZE = 32  # pixels per side of a tile and of the tiny model's square
# Worked out by hand from MiniCPM-V's rule, at most 9 tiles of 448: picture -> (columns, rows)
GRIDS = {
    (300, 200): None,  # 0.3 tiles' worth
    (448, 448): None,  # 1 exactly
    (449, 448): (2, 1),  # just over 1: of 2 or 3 tiles; log(449/448) is nearest to log 2, then log 1/2
    (640, 480): (2, 1),  # 1.53 -> 2 or 3
    (480, 640): (1, 2),
    (1000, 1000): (2, 2),  # 4.98 -> 4, 5 or 6
    (1024, 768): (2, 2),  # 3.92 -> 3, 4 or 5
    (1344, 896): (3, 2),  # 6 exactly
    (896, 1344): (2, 3),
    (1600, 1000): (4, 2),  # 7.97 -> 7, 8 or 9: log 1.6 = 0.47, log 4/2 = 0.69, log 3/3 = 0
    (2000, 1500): (3, 3),  # 14.9 -> 9, so 8 or 9: log 4/3 = 0.29 is nearer to 0 than to 0.69
    (3000, 1000): (4, 2),  # log 3 = 1.10: log 4/2 = 0.69 is nearer than log 8/1 = 2.08
    (1000, 3000): (2, 4),
    (4000, 400): (9, 1),  # 7.97 -> 7, 8 or 9: log 10 = 2.30, log 9 = 2.20
}


# --- grids and tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", GRIDS)
def test_the_grid_is_the_published_one(size):
    assert choose_grid(*size, slice_size=448, max_slices=9) == GRIDS[size]


def test_fewer_tiles_give_other_grids():
    assert choose_grid(2000, 1500, slice_size=448, max_slices=4) == (2, 2)
    assert choose_grid(1344, 896, slice_size=448, max_slices=2) == (2, 1)


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(2, 12))
def test_no_picture_is_enlarged_beyond_reason(width, height, most):
    grid = choose_grid(width, height, slice_size=448, max_slices=most)
    worth = width * height / 448**2
    if grid is None:
        assert worth <= 1
        return
    tiles, multiple = grid[0] * grid[1], min(int(np.ceil(worth)), most)
    assert 2 <= tiles <= min(most, multiple + 1) and tiles >= multiple - 1
    assert tiles / worth < (multiple + 1) / (multiple - 1) <= 3


def png(width, height, *, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def joined(tiles, grid):
    columns, rows = grid
    return np.vstack([np.hstack(tiles[row * columns : (row + 1) * columns]) for row in range(rows)])


def test_the_tiles_together_are_the_resized_picture():
    pixels, data = png(96, 64)
    picture = read_picture(data, slicing=Slicing(9, SIZE), image_size=SIZE)
    assert picture.grid == (3, 2) and len(picture.images) == 7
    tiles = [decode_rgb(image.data) for image in picture.images[1:]]
    assert all(tile.shape == (SIZE, SIZE, 3) for tile in tiles)
    np.testing.assert_array_equal(joined(tiles, (3, 2)), pixels)  # the right size already: no bit lost
    whole = resize_rgb(pixels, 4 * SIZE, SIZE)
    np.testing.assert_array_equal(joined(cut_tiles(whole, (4, 1)), (4, 1)), whole)


def test_a_resized_photograph_is_cut_as_a_whole():
    data = make_jpeg(3, 200, 150)
    picture = read_picture(data, slicing=Slicing(9, SIZE), image_size=SIZE)
    assert picture.grid == (3, 3) and {(i.width, i.height) for i in picture.images[1:]} == {(SIZE, SIZE)}
    whole = resize_rgb(decode_rgb(data), 3 * SIZE, 3 * SIZE).astype(int)
    error = np.abs(joined([decode_rgb(image.data) for image in picture.images[1:]], (3, 3)) - whole)
    assert error.mean() < 6, "JPEG's loss and no more"
    assert picture.images[0] == read_picture(data, image_size=SIZE).images[0], "the overview stays"


# --- a dataset --------------------------------------------------------------------------------------------

PHOTOS = {"wide": (96, 32), "tall": (32, 96), "photo": (64, 48), "small": (32, 32)}
LAYOUT = {"wide": [3, 1], "tall": [1, 3], "photo": [2, 2], "small": [0, 0]}
RECORDS = [
    (["photo"], "What is this?"),
    (["small"], "And <slice> this </slice>?"),
    ([], "No picture, but <slice>?"),
    (["wide", "small", "tall"], "First <image>, then <image>, last <image>."),
    (["wide"], "<image>\nOnce more."),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    for number, (name, size) in enumerate(PHOTOS.items()):
        (folder / f"{name}.jpg").write_bytes(make_jpeg(number, *size))
    records = []
    for number in range(40):
        names, question = RECORDS[number % len(RECORDS)]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"No. {number}."}]
        records.append({"id": str(number), "messages": messages, "images": [f"{n}.jpg" for n in names]})
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_tokenizer(folder / "plain")
    prepare_tokenizer(folder / "plain", folder / "tokenizer", chat_template="keep", slice_tokens=SLICE_TOKENS)
    settings = BuildSettings(
        source=(str(folder / "chat.jsonl"),),
        tokenizer=str(folder / "tokenizer"),
        num_query=4,
        image_size=SIZE,
        max_slices=9,
        samples_per_shard=10,
    )
    return Corpus(folder, settings, len(records))


@pytest.fixture(scope="module")
def built(corpus):
    corpus.build(corpus.folder / "data", options=INLINE)
    return corpus.folder / "data"


@pytest.fixture(scope="module")
def whole(corpus):
    """The same without slicing."""
    corpus.build(corpus.folder / "whole", options=INLINE, max_slices=0)
    return corpus.folder / "whole"


def text_of(dataset, sample):
    """The sample's ids as text, an image block as ``[]``."""
    decoded = load_tokenizer(dataset.tokenizer_dir).decode(sample.input_ids, skip_special_tokens=False)
    return decoded.replace("<im_start>" + "<im_patch>" * 4 + "<im_end>", "[]")


def test_ids_and_index_say_what_was_cut(built):
    dataset = Dataset(built)
    for position, row in enumerate(dataset.index.to_pylist()):
        names, _ = RECORDS[int(row["id"]) % len(RECORDS)]
        sample = dataset[position]
        assert row["slices"] == [LAYOUT[name] for name in names]
        assert row["n_images"] == len(sample.images) == sum(1 + c * r for c, r in row["slices"])
        assert row["n_tokens"] == len(sample.input_ids)
    texts = [text_of(dataset, dataset[i]) for i in range(len(RECORDS))]
    assert "<|user|>\n[]<slice>[][]\n[][]</slice>\nWhat is this?</s>" in texts[0]
    assert "[]\nAnd <slice> this </slice>?" in texts[1]
    assert "First []<slice>[][][]</slice>, then [], last []<slice>[]\n[]\n[]</slice>." in texts[3]
    special = dataset.manifest.special_tokens
    counts = [int((dataset[i].input_ids == special["<slice>"]).sum()) for i in range(len(RECORDS))]
    assert counts == [1, 0, 0, 2, 1], "what people type stays text"
    assert "up to 9 tiles of 32 pixels" in (built / "README.md").read_text()
    assert dataset.manifest.settings["max_slices"] == 9 and dataset.manifest.settings["slice_size"] == SIZE


def test_without_the_tiles_a_sample_is_what_it_is_without_slicing(built, whole):
    cut, plain = Dataset(built), Dataset(whole)
    assert plain.index["slices"].to_pylist() == [[]] * 40 and "tiles" not in (whole / "README.md").read_text()
    for position in range(40):
        a, b = cut[position], plain[position]
        layout = cut.row(position)["slices"]
        firsts = np.cumsum([0, *(1 + c * r for c, r in layout)])[:-1]
        assert tuple(a.images[first] for first in firsts) == b.images
        if all(c == 0 for c, _ in layout):  # no picture, or a small one
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.labels, b.labels)
        assert a.input_ids[a.labels != -100].tolist() == b.input_ids[b.labels != -100].tolist()


def test_workers_and_a_second_run_change_no_byte(corpus, built, tmp_path):
    corpus.build(tmp_path / "two", options=RunOptions(workers=2, quiet=True))
    assert digests(tmp_path / "two") == digests(built)


@pytest.mark.parametrize("step", [12, 30, 45])
def test_a_killed_build_goes_on(corpus, built, tmp_path, step):
    assert killed_at(step, corpus, tmp_path / "data") and not (tmp_path / "data" / MANIFEST).exists()
    corpus.build(tmp_path / "data", options=INLINE)
    assert digests(tmp_path / "data") == digests(built)


def test_verify_proves_the_layout_and_repair_gives_it_back(built, tmp_path):
    assert not verify(built, deep=True).findings
    damaged = shutil.copytree(built, tmp_path / "data")
    (damaged / INDEX).unlink()
    repair(damaged)
    assert Dataset(damaged).index["slices"].equals(Dataset(built).index["slices"])
    table = pq.read_table(damaged / INDEX)
    rows = table.to_pylist()
    rows[0]["slices"] = [[1, 4]]  # as many tiles, but of another shape
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), damaged / INDEX)
    [finding] = verify(damaged, deep=True).findings
    assert "slices is [[1, 4]] in the index, [[2, 2]] in the shard" in finding.what
    rows[0]["slices"] = [[5, 4]]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), damaged / INDEX)
    assert "slices does not account for n_images" in {f.what for f in verify(damaged).findings}


def test_an_index_from_before_the_column_still_reads(whole, tmp_path):
    old = shutil.copytree(whole, tmp_path / "old")
    pq.write_table(pq.read_table(old / INDEX).drop_columns(["slices"]), old / INDEX)
    assert Dataset(old).index.equals(Dataset(whole).index)
    [view] = read_views(Dataset(old), [3])
    assert view.row["slices"] == [] and view.slice_names == ["", "", ""]


def test_inspect_names_the_parts(built):
    from omnidata.inspect.terminal import chip

    [view] = read_views(Dataset(built), [3])
    chips = [chip(run, view).strip() for run in view.runs if run.kind == "image"]
    assert chips[:2] == ["image 96×32 · 3×1 slices · 6 tokens", "image 32×32 · slice 1,1 · 6 tokens"]
    assert chips[4] == "image 32×32 · 6 tokens" and "slice 1,3" in chips[8]


def test_what_cannot_work_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"lacks <slice> and </slice>.*prepare-tokenizer"):
        corpus.build(tmp_path / "a", tokenizer=str(corpus.folder / "plain"))
    with pytest.raises(UserError, match="at least 2 tiles"):
        replace(corpus.settings, max_slices=1)
    with pytest.raises(UserError, match="content may spell them"):
        corpus.build(tmp_path / "b", content_token=("<slice>",))


def test_other_names_for_the_tokens(corpus, tmp_path):
    names = ("<tiles>", "</tiles>")
    prepare_tokenizer(corpus.folder / "plain", tmp_path / "tok", chat_template="keep", slice_tokens=names)
    corpus.build(tmp_path / "data", options=INLINE, tokenizer=str(tmp_path / "tok"), slice_tokens=names)
    dataset = Dataset(tmp_path / "data")
    assert "[]<tiles>[][]\n[][]</tiles>" in text_of(dataset, dataset[0])
    assert not verify(tmp_path / "data", deep=True).findings


def test_a_tokenizer_is_only_changed_when_asked(tmp_path):
    golden = golden_tokenizer_folder()
    assert fingerprint(prepare_tokenizer(golden, tmp_path / "a")) == fingerprint(load_tokenizer(golden))
    more = prepare_tokenizer(golden, tmp_path / "b", slice_tokens=SLICE_TOKENS)
    assert more.convert_tokens_to_ids(list(SLICE_TOKENS)) == [32009, 32010] and len(more) == 32011
    assert len(prepare_tokenizer(tmp_path / "b", tmp_path / "c", slice_tokens=SLICE_TOKENS)) == 32011


def test_tiles_in_a_reply_are_not_learned(corpus):
    tokenizer = load_tokenizer(corpus.settings.tokenizer)
    renderer = Renderer(tokenizer, num_query=4, slice_tokens=SLICE_TOKENS)
    reply = (TextPart("Look "), ImagePart(0, grid=(2, 2)), TextPart(" there."))
    turns = (Message("user", (TextPart("Draw"),)), Message("assistant", reply))
    rendered = renderer.render(Conversation("x", turns))
    learned = tokenizer.decode(rendered.input_ids[rendered.labels != -100], skip_special_tokens=False)
    assert learned == "Look  there.</s>" and rendered.num_images == 5


@pytest.mark.parametrize("max_slices", [0, 9])
def test_pictures_of_turns_that_were_cut_off_are_not_stored(corpus, tmp_path, max_slices):
    turns = [("user", "<image>One?"), ("assistant", "One."), ("user", "<image>Two?"), ("assistant", "Two.")]
    record = {"id": "x", "messages": [{"role": role, "content": text} for role, text in turns]}
    record["images"] = [str(corpus.folder / "photo.jpg"), str(corpus.folder / "wide.jpg")]
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    longest = 90 if max_slices else 45
    settings = {"source": (str(tmp_path / "long.jsonl"),), "image_root": str(corpus.folder)}
    corpus.build(tmp_path / "data", options=INLINE, max_slices=max_slices, max_length=longest, **settings)
    dataset = Dataset(tmp_path / "data")
    assert dataset.manifest.num_truncated == 1 and len(dataset[0].images) == (5 if max_slices else 1)
    assert not verify(tmp_path / "data", deep=True).findings


# --- training and asking ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(built):
    """A model trained for a moment on the cut pictures."""
    recipe = tiny_recipe(
        built, built.parent / "run", optim={"steps": 2, "warmup_steps": 1}, data={"max_tokens": 256}
    )
    recipe["data"]["train"] = [{"path": str(built)}]
    train(load_recipe(write_recipe(built.parent / "recipe.yaml", recipe)))
    return built.parent / "run" / "final"


def test_the_loader_feeds_overviews_and_tiles(built):
    loader = PackLoader([{"path": str(built)}], max_tokens=256, global_batch=1, image_size=SIZE, num_epochs=1)
    microbatches = list(loader)
    start = Dataset(built).manifest.special_tokens["<im_start>"]
    assert sum(len(m.images) for m in microbatches) == Dataset(built).manifest.num_images
    for microbatch in microbatches:
        assert len(microbatch.images) == int((microbatch.input_ids == start).sum())


@pytest.mark.parametrize("position", range(len(RECORDS)))
def test_the_model_is_asked_as_it_was_trained(model_dir, corpus, built, position):
    """The folder alone tells how to cut: ids and pixels of the prompt are those of the sample."""
    prompts = load_for_answers(str(model_dir), device="cpu", dtype="float32")
    model = prompts.model
    assert slicing_of(model.config.slicing) == corpus.settings.slicing
    names, question = RECORDS[position]
    answerer = Answerer(prompts, sampling={"do_sample": False, "max_new_tokens": 2})
    turns = [{"role": "user", "content": question}]
    ids, images = prompts.prompt(turns, [str(corpus.folder / f"{name}.jpg") for name in names])
    sample = Dataset(built)[position]
    start = int(np.argmax(sample.labels != -100))
    assert ids.tolist() == sample.input_ids[:start].tolist()
    [view] = read_views(Dataset(built), [position])
    parts = zip(view.slice_names, images, sample.images, strict=True)
    assert all(asked == trained for name, asked, trained in parts if name.startswith("slice "))
    assert isinstance(answerer.reply(turns, [str(corpus.folder / f"{name}.jpg") for name in names]), str)
    special = Dataset(built).manifest.special_tokens
    assert {special["<slice>"], special["</slice>"]} < set(model.config.image_token_ids)


def test_evaluation_wants_the_models_slicing(model_dir, built, whole, capsys):
    with torch.inference_mode():
        assert evaluate(["--model", str(model_dir), "--data", str(built), "--limit", "3"]) == 0
    assert evaluate(["--model", str(model_dir), "--data", str(whole)]) == 1
    assert "--max-slices" in capsys.readouterr().err
