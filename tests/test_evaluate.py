"""Questions come from the labels, batches answer like single questions, and swapped pictures are others."""

import json

import numpy as np
import pytest
import torch
from tiny_recipe import MODEL

from omnidata import Dataset
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.evaluate import main
from pipelines.prompts import padded_inputs, prompts_for
from pipelines.questions import (
    Answer,
    answer_questions,
    questions_of,
    supervised_spans,
    with_swapped_images,
)


@pytest.fixture(scope="module")
def dataset(tiny_dataset):
    return Dataset(tiny_dataset, "train")


@pytest.fixture(scope="module")
def model(dataset):
    manifest = dataset.manifest
    ids = {f"im_{name}_token": manifest.special_tokens[f"<im_{name}>"] for name in ("patch", "start", "end")}
    ids |= {f"{name}_token_id": manifest.special_tokens[name] for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = OmniLMMConfig(**MODEL, **ids, vocab_size=manifest.vocab_size, num_query=manifest.num_query)
    return OmniLMMForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts(dataset, model):
    return prompts_for(model, dataset.tokenizer_dir)


def ask(dataset, prompts, **options):
    return list(questions_of(dataset, prompts, **options))


def test_every_supervised_span_is_a_question(dataset, prompts):
    questions = ask(dataset, prompts, with_text_only=True)
    samples = {dataset[i].key: dataset[i] for i in range(len(dataset))}
    assert len(questions) == sum(2 if int(key[-6:]) % 4 == 0 else 1 for key in samples)
    for question in questions:
        ids = samples[question.key].input_ids
        assert np.array_equal(question.prompt, ids[: len(question.prompt)])
        start = len(question.prompt)
        assert np.array_equal(question.answer, ids[start : start + len(question.answer)])
        assert ids[start + len(question.answer)] == dataset.manifest.special_tokens["eos"]
        assert question.images == samples[question.key].images


def test_questions_without_a_picture_are_left_out(dataset, prompts):
    assert all(question.images for question in ask(dataset, prompts))
    assert 0 < len(ask(dataset, prompts)) < len(ask(dataset, prompts, with_text_only=True))


def test_spans():
    assert supervised_spans(np.array([-100, -100, 5, 2, -100, 7, 2])) == [(2, 4), (5, 7)]
    assert supervised_spans(np.array([5])) == [(0, 1)]
    assert supervised_spans(np.array([-100])) == []


def test_padding_on_the_left():
    found = padded_inputs([np.array([7, 8, 9]), np.array([5])], pad=0, device=torch.device("cpu"))
    assert found["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_answers_as_its_questions_one_by_one(dataset, prompts):
    questions = ask(dataset, prompts, with_text_only=True)[:9]
    together = answer_questions(prompts, questions, batch_size=9)
    alone = answer_questions(prompts, questions, batch_size=1)
    assert {len(question.images) for question in questions} == {0, 1, 2}
    for one, other in zip(alone, together, strict=True):
        assert one.text == other.text and one.question is other.question
        assert one.truth == other.truth == prompts.tokenizer.decode(one.question.answer)


def test_swapped_pictures_are_all_other_ones(dataset, prompts):
    questions = ask(dataset, prompts)
    swapped = with_swapped_images(questions)
    for question, other in zip(questions, swapped, strict=True):
        assert len(question.images) == len(other.images)
        assert all(a != b for a, b in zip(question.images, other.images, strict=True))
        assert question.prompt is other.prompt


def test_exactness_and_f1():
    def answer(text, truth):
        return Answer(None, text, truth)

    assert answer(" red ", "red").is_exact and not answer("a red", "red").is_exact
    assert answer("a red square", "red square").f1 == pytest.approx(0.8)
    assert answer("", "").f1 == 1.0 and answer("x", "").f1 == 0.0


def test_the_script_writes_its_three_keys(dataset, model, tmp_path, capsys):
    import shutil

    model.save_pretrained(tmp_path / "model")
    shutil.copytree(dataset.tokenizer_dir, tmp_path / "model", dirs_exist_ok=True)
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        dataset.path,
        "--split",
        "val",
        "--swap-images",
    ]
    outputs = ["--out", str(tmp_path / "runs/eval.json"), "--answers", str(tmp_path / "answers.jsonl")]
    assert main([*arguments, *outputs]) == 0
    report = json.loads((tmp_path / "runs/eval.json").read_text())
    assert set(report) == {"accuracy", "accuracy_swapped", "num_questions"}
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * report["num_questions"]
    assert (
        report["accuracy"]
        == sum(row["exact"] for row in rows if row["figure"] == "accuracy") / report["num_questions"]
    )
    assert main(["--model", str(tmp_path), "--data", dataset.path]) == 1
    assert "no model folder" in capsys.readouterr().err
