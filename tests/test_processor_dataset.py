"""Datasets of processors, from the command line to the microbatch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from dataclasses import dataclass

import numpy as np
import processors
import pytest
import torch
from PIL import Image

from omnidata import Dataset, cli
from omnidata.loader import PackLoader
from omnidata.profiles.folder import load_processor
from omnidata.profiles.opening import open_profile
from omnidata.profiles.processor import ProcessorProfile
from omnidata.schema import IGNORE_INDEX, UserError
from omnidata.verify.run import verify

SIZES = ((64, 48), (100, 30), (37, 41), (300, 200))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """24 records: text, one picture, two, a picture in the second turn, and one picture of 1×201."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(root):
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate((*SIZES, (1, 201), (900, 700))):
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / f"{number}.jpg", quality=92)
    with (root / "corpus.jsonl").open("w") as file:
        for i in range(24):
            file.write(json.dumps(record(i)) + "\n")
    return root


def record(i):
    names = [[], [f"{i % 4}.jpg"], [f"{i % 4}.jpg", f"{(i + 1) % 4}.jpg"], [f"{i % 4}.jpg"]][i % 4]
    if i == 21:
        names = ["4.jpg"]
    marks = "<image>\n" * len(names)
    turns = [("user", f"{marks}What is {i}?"), ("assistant", f"It is {i}.")]
    if i % 4 == 3:
        turns = [("user", "Hi"), ("assistant", "Ho"), *turns]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"id": f"r{i}", "images": names, "messages": messages}


@dataclass
class Result:
    """What a command printed, and its exit code."""

    exit_code: int
    output: str
    error: str  # without "Error: "


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(argument) for argument in arguments])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("Error: ")]
    assert len(errors) == (code == 1), err.getvalue()
    return Result(code, out.getvalue(), "".join(errors).removeprefix("Error: "))


def build(corpus, model, out, *more):
    base = ("build-shards", corpus / "corpus.jsonl", "--image-root", corpus, "--model", model, "--out", out)
    return run(*base, "--samples-per-shard", 8, "--workers", 1, "--quiet", *more)


@pytest.fixture(scope="module")
def qwen(corpus, tmp_path_factory):
    """A dataset of a small Qwen3-VL, and its model's folder."""
    root = tmp_path_factory.mktemp("qwen")
    model = processors.save_model("qwen3_vl", root / "model")
    result = build(corpus, model, root / "data")
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def data(qwen, tmp_path):
    """A copy of the dataset to damage."""
    return shutil.copytree(qwen / "data", tmp_path / "data")


def digests(root):
    return {
        path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


# --- building -----------------------------------------------------------------------------------------------


def test_what_a_build_keeps(qwen):
    dataset = Dataset(qwen / "data")
    manifest, profile = dataset.manifest, dataset.manifest.profile
    assert manifest.num_records == manifest.num_samples + manifest.num_rejects == 24
    assert manifest.rejects == {"image_shape": 1}, "1×201 is longer than Qwen takes"
    assert "absolute aspect ratio" in dataset.rejects["detail"][0].as_py()
    assert (profile["name"], profile["processor"]) == ("processor", "Qwen3VLProcessor")
    assert profile["positions"] == "mrope"
    assert manifest.image_policy == "keep"
    assert "num_query" not in manifest.settings
    assert (qwen / "data" / "processor" / "config.json").is_file()
    again = open_profile(str(qwen / "data"), manifest)
    for row, sample in zip(dataset.index.to_pylist(), dataset, strict=True):
        sizes = tuple(tuple(size) for size in row["image_sizes"])
        runs = again.runs(sizes) if sizes else ()
        assert row["image_tokens"] == [run.num_tokens for run in runs]
        assert row["image_pixels"] == [run.num_pixels for run in runs]
        for start, run in zip(row["image_starts"], runs, strict=True):
            ids = sample.input_ids[start : start + run.num_tokens]
            np.testing.assert_array_equal(ids, again.run_ids(run.text))


def test_workers_and_stops_change_no_byte(corpus, qwen, tmp_path):
    assert build(corpus, qwen / "model", tmp_path / "two", "--workers", 2).exit_code == 0
    assert digests(tmp_path / "two") == digests(qwen / "data")
    for part in ("0/2", "1/2"):
        assert build(corpus, qwen / "model", tmp_path / "parts", "--task", part).exit_code == 0
    assert digests(tmp_path / "parts") == digests(qwen / "data")


def test_arguments_of_the_processor_count_and_are_kept(corpus, tmp_path):
    model = processors.save("qwen3_vl", tmp_path / "model")
    result = build(corpus, model, tmp_path / "data", "--processor-arg", "max_pixels=16384")
    assert result.exit_code == 0, result.output
    dataset = Dataset(tmp_path / "data")
    area = {"shortest_edge": 65536, "longest_edge": 16384}  # as today's transformers takes it
    assert dataset.manifest.profile["arguments"] == {"size": area}
    assert dataset.manifest.settings["processor_arg"] == ["max_pixels=16384"]
    whole = ProcessorProfile(load_processor(model)).runs(((300, 200),))[0].num_tokens
    rows = [row for row in dataset.index.to_pylist() if row["image_sizes"] == [[300, 200]]]
    assert rows
    assert all(row["image_tokens"][0] < whole for row in rows)
    unknown = build(corpus, model, tmp_path / "other", "--processor-arg", "max_pixel=16384")
    assert unknown.exit_code == 1
    assert "has no argument max_pixel" in unknown.error


# --- looking at it ------------------------------------------------------------------------------------------


def test_inspect_and_plan_show_the_runs(qwen):
    shown = run("inspect", qwen / "data", "--sample", 1)
    assert shown.exit_code == 0, shown.output
    assert "Qwen3VLProcessor" in run("inspect", qwen / "data").output
    [row] = Dataset(qwen / "data").rows([1])
    assert f"image 100×30 · {row['image_tokens'][0]} tokens" in " ".join(shown.output.split())
    summary = json.loads(run("inspect", qwen / "data", "--json").output)
    assert summary["tokens_per_image"]["max"] == max(
        max(row["image_tokens"], default=0) for row in Dataset(qwen / "data").index.to_pylist()
    )
    planned = run(
        "plan", qwen / "data", "--max-tokens", 512, "--global-batch", 4, "--world-size", 2, "--json"
    )
    assert json.loads(planned.output)["num_samples"] == 23


def test_verify_finds_a_run_that_is_not_the_pictures(data):
    """A picture of another size in place of the stored one; all digests are made to fit."""
    dataset = Dataset(data)
    profile = open_profile(str(data), dataset.manifest)
    row = next(row for row in dataset.index.to_pylist() if row["image_sizes"] == [[300, 200]])
    sample = dataset[dataset.index["key"].to_pylist().index(row["key"])]
    from omnidata.verify.runs import run_columns
    from omnidata.verify.slices import LayoutError

    sizes = [[300, 200]]
    assert run_columns(sample, profile, sizes, row)["image_starts"] == row["image_starts"]
    assert run_columns(sample, profile, sizes, None)["image_starts"] == row["image_starts"]
    with pytest.raises(LayoutError, match=r"image tokens in the ids|are not in the ids"):
        run_columns(sample, profile, [[64, 48]], row)
    with pytest.raises(LayoutError, match="image tokens in the ids"):
        run_columns(sample, profile, [], row)


def test_an_index_that_is_lost_is_rebuilt_from_the_shards(data):
    before = Dataset(data).index
    (data / "index.parquet").unlink()
    assert run("verify", data, "--repair").exit_code in (0, 1)
    after = Dataset(data).index
    for name in ("key", "image_sizes", "image_starts", "image_tokens", "image_pixels", "content_hash"):
        assert after[name].to_pylist() == before[name].to_pylist()


# --- loading ------------------------------------------------------------------------------------------------


def microbatches(path, **options):
    loader = PackLoader(path, global_batch=2, max_tokens=300, num_epochs=1, seed=3, **options)
    return loader, list(loader)


def equal(a, b):
    assert a.keys == b.keys
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "token_type_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.images.keys() == b.images.keys()
    assert all(torch.equal(a.images[name], b.images[name]) for name in a.images)


def test_workers_and_resuming_give_the_same_microbatches(qwen):
    _, alone = microbatches(qwen / "data")
    _, shared = microbatches(qwen / "data", num_workers=2)
    assert len(alone) == len(shared) == 4
    for a, b in zip(alone, shared, strict=True):
        equal(a, b)
    loader = PackLoader(qwen / "data", global_batch=2, max_tokens=300, num_epochs=1, seed=3)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    resumed = PackLoader(qwen / "data", global_batch=2, max_tokens=300, num_epochs=1, seed=3)
    resumed.load_state_dict(state)
    for a, b in zip(alone[2:], resumed, strict=True):
        equal(a, b)


def test_raw_pixels_are_bytes_and_normalise_to_the_processors_own(qwen):
    _, whole = microbatches(qwen / "data")
    loader, raw = microbatches(qwen / "data", raw_pixels=True)
    for a, b in zip(whole, raw, strict=True):
        if a.images:
            assert b.images["pixel_values"].dtype == torch.uint8
        for name, tensor in loader.normalise(b.images).items():
            torch.testing.assert_close(tensor, a.images[name], rtol=0, atol=1e-5)


def test_an_augmentation_that_changes_sizes_is_refused(qwen):
    with pytest.raises(UserError, match=r"augment\.crop"):
        PackLoader(qwen / "data", global_batch=1, augment={"crop": 0.2})
    bright = PackLoader(
        qwen / "data", global_batch=1, augment={"brightness": 0.2}, num_epochs=1, max_tokens=512
    )
    assert any(microbatch.images for microbatch in bright)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_processor_that_changed_is_refused_by_name_of_what_changed(data):
    """Another number of pixels per token, as a release of transformers might bring."""
    file = data / "processor" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["size"] = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the run of pictures of 640×480 took .* tokens, now"):
        PackLoader(data, global_batch=1)
    [finding] = [f for f in verify(data).findings if f.code == "processor"]
    assert "640×480" in finding.what


def test_another_filter_is_a_change_too(data):
    file = data / "processor" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["resample"] = 0  # nearest
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"pixel_values of pictures of .*: values differ"):
        PackLoader(data, global_batch=1)


def test_a_folder_without_a_processor(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    tokenizer = processors.tokenizer(processors.CHATML, {})
    tokenizer.save_pretrained(tmp_path / "text")
    for folder, message in (
        ("empty", "no processor"),
        ("text", "no processor of pictures and text|no processor can be loaded"),
        ("nowhere", "no such folder"),
    ):
        result = build(corpus, tmp_path / folder, tmp_path / "out")
        assert result.exit_code == 1
        assert any(part in result.error for part in message.split("|"))


def test_a_processor_without_a_chat_template(corpus, tmp_path):
    model = tmp_path / "model"
    processors.save("qwen3_vl", model, small=True)
    (model / "chat_template.jinja").unlink()
    result = build(corpus, model, tmp_path / "out")
    assert result.exit_code == 1
    assert "chat template" in result.error


def test_a_processor_whose_package_is_missing_names_it(corpus, tmp_path, monkeypatch):
    import sys

    model = processors.save("smolvlm", tmp_path / "model", small=True)
    monkeypatch.setitem(sys.modules, "num2words", None)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    result = build(corpus, model, tmp_path / "out")
    assert result.exit_code == 1
    assert "num2words" in result.error
    assert "pip install" in result.error


def test_flags_of_the_other_profile_are_refused(corpus, tmp_path):
    for more, message in (
        (("--num-query", "16"), "--num-query: of OmniLMM's profile"),
        (("--max-slices", "4"), "--max-slices: of OmniLMM's profile"),
        (("--tokenizer", "x"), "either --model"),
    ):
        result = build(corpus, tmp_path, tmp_path / "out", *more)
        assert result.exit_code == 1
        assert message in result.error


def test_datasets_of_two_models_do_not_mix(qwen, corpus, tmp_path):
    model = processors.save("internvl", tmp_path / "model", small=True)
    assert build(corpus, model, tmp_path / "data").exit_code == 0
    with pytest.raises(UserError, match="differ in"):
        PackLoader([str(qwen / "data"), str(tmp_path / "data")], global_batch=1)


def test_every_label_is_the_id_or_ignored_and_no_picture_is_learned(qwen):
    dataset = Dataset(qwen / "data")
    for row, sample in zip(dataset.index.to_pylist(), dataset, strict=True):
        supervised = sample.labels != IGNORE_INDEX
        assert supervised.sum() == row["n_supervised"] > 0
        for start, number in zip(row["image_starts"], row["image_tokens"], strict=True):
            assert not supervised[start : start + number].any()
