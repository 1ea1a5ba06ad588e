"""Each family of processors, from the command line to the tensors of a microbatch."""

from __future__ import annotations

import io
import json

import numpy as np
import processors
import pytest
import torch
from PIL import Image
from processors import FAMILIES
from test_processor_dataset import build, record, run, write_corpus

from omnidata import Dataset
from omnidata.loader import PackLoader
from omnidata.profiles.folder import load_processor
from omnidata.schema import UserError
from omnidata.verify.run import verify


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_verified_and_loaded(corpus, tmp_path, family):
    """The microbatch's tensors are what the processor makes of the stored pictures."""
    model = processors.save(family, tmp_path / "model", small=True)
    result = build(corpus, model, tmp_path / "data")
    assert result.exit_code == 0, result.output
    report = verify(tmp_path / "data", deep=True, num_workers=1)
    assert report.ok, report.findings
    dataset, processor = Dataset(tmp_path / "data"), load_processor(model)
    position = {key: at for at, key in enumerate(dataset.index["key"].to_pylist())}
    seen = 0
    for microbatch in PackLoader(tmp_path / "data", global_batch=1, max_tokens=1024, num_epochs=1):
        samples = [dataset[position[key]] for key in microbatch.keys]
        seen += len(samples)
        ids = np.concatenate([sample.input_ids for sample in samples])
        np.testing.assert_array_equal(microbatch.input_ids.numpy(), ids)
        is_image = np.isin(ids, dataset.manifest.profile["image_token_ids"])
        np.testing.assert_array_equal(microbatch.token_type_ids.numpy(), is_image)
        expected = own_tensors(processor, samples)
        assert microbatch.images.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(microbatch.images[name], tensor, rtol=0, atol=1e-5)
    assert seen == dataset.manifest.num_samples


def own_tensors(processor, samples):
    """The processor's, by its own batching, of pictures that Pillow decoded."""
    pictures = [[Image.open(io.BytesIO(data)) for data in s.images] for s in samples if s.images]
    if not pictures:
        return {}
    texts = [processor.image_token * len(each) for each in pictures]
    out = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    text = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    return {
        name: torch.stack(value) if isinstance(value, list) else value
        for name, value in out.items()
        if name not in text
    }


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm", "llava_onevision"])
def test_pictures_are_stored_smaller_only_where_their_runs_stay_equal(corpus, tmp_path, family):
    model = processors.save(family, tmp_path / "model", small=True)
    line = {"id": "a", "images": ["5.jpg"], "messages": record(1)["messages"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    rows = {}
    for policy in ("keep", "shrink"):
        arguments = ("--image-root", corpus, "--model", model, "--out", tmp_path / policy, "--quiet")
        result = run("build-shards", tmp_path / "one.jsonl", *arguments, "--image-policy", policy)
        assert result.exit_code == 0, result.output
        [rows[policy]] = Dataset(tmp_path / policy).index.to_pylist()
        assert verify(tmp_path / policy, deep=True, num_workers=1).ok
    for name in ("image_tokens", "image_pixels", "image_starts", "n_tokens"):
        assert rows["keep"][name] == rows["shrink"][name]
    assert rows["keep"]["image_sizes"] == [[900, 700]]
    [[width, height]] = rows["shrink"]["image_sizes"]
    assert width * height < 900 * 700 / 2
    assert width / height == pytest.approx(900 / 700, rel=0.02)


def test_a_family_without_raw_pixels_says_so(corpus, tmp_path):
    model = processors.save("smolvlm", tmp_path / "model", small=True)
    assert build(corpus, model, tmp_path / "data").exit_code == 0
    with pytest.raises(UserError, match="raw_pixels"):
        PackLoader(tmp_path / "data", global_batch=1, raw_pixels=True)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_positions_are_the_models_own_document_by_document(corpus, tmp_path, family):
    import transformers

    model = processors.save_model(family, tmp_path / "model")
    assert build(corpus, model, tmp_path / "data").exit_code == 0
    config = transformers.AutoConfig.from_pretrained(model)
    config.vision_config.depth = 1
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    image_ids = Dataset(tmp_path / "data").manifest.profile["image_token_ids"]
    seen = 0
    for microbatch in PackLoader(tmp_path / "data", global_batch=1, max_tokens=300, num_epochs=1):
        assert microbatch.position_ids.shape == (4, microbatch.num_tokens)
        grids = microbatch.images.get("image_grid_thw", torch.zeros((0, 3), dtype=torch.long))
        for start, stop in zip(*[microbatch.cu_seqlens.tolist()[k:] for k in (0, 1)], strict=False):
            ids = microbatch.input_ids[None, start:stop]
            types = torch.isin(ids, torch.tensor(image_ids)).int()
            number = count_pictures(microbatch.images, types, grids)
            mine, grids = grids[:number], grids[number:]
            expected, _ = whole.model.get_rope_index(
                ids, mm_token_type_ids=types, image_grid_thw=mine if number else None
            )
            assert torch.equal(microbatch.position_ids[1:, start:stop], expected[:, 0])
            assert torch.equal(microbatch.position_ids[0, start:stop], torch.arange(stop - start))
            seen += 1
        assert len(grids) == 0
    assert seen == Dataset(tmp_path / "data").manifest.num_samples


def count_pictures(images, types, grids):
    """How many of the next grids fill the image tokens of one document (2×2 patches a token)."""
    left, number = int(types.sum()), 0
    while left:
        left -= int(grids[number].prod()) // 4
        number += 1
    return number


def test_samples_are_cut_only_where_the_runs_stand_alone(corpus, tmp_path):
    """LLaVA-OneVision writes other runs when a picture is gone; InternVL does not."""
    kept = {}
    for family in ("internvl", "llava_onevision"):
        model = processors.save(family, tmp_path / family, small=True)
        lines = [
            {
                "id": "a",
                "images": ["0.jpg", "1.jpg"],
                "messages": [
                    {"role": "user", "content": "<image>One"},
                    {"role": "assistant", "content": "1."},
                    {"role": "user", "content": "<image>Two"},
                    {"role": "assistant", "content": "2."},
                ],
            }
        ]
        (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines)))
        out = tmp_path / f"{family}-data"
        arguments = ("--image-root", corpus, "--model", model, "--out", out, "--quiet")
        assert run("build-shards", tmp_path / "one.jsonl", *arguments).exit_code == 0
        [row] = Dataset(out).index.to_pylist()
        plan = PackLoader(out, global_batch=1, max_tokens=row["n_tokens"] - 1, oversize="cut").plan
        kept[family] = (plan.totals.num_cut, plan.totals.num_left_out)
    assert kept == {"internvl": (1, 0), "llava_onevision": (0, 1)}
