"""Asking a model: the prompt is the one that was trained on, and mistakes are one clear line."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from messages import error_line
from throwaway import golden_tokenizer_folder
from tiny_dataset import make_jpeg
from tiny_recipe import MODEL

from omnidata import Dataset
from omnidata.conversation import to_conversation
from omnidata.render import Renderer
from omnidata.schema import Record
from omnidata.text.tokenizer import load_tokenizer
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.generate import Answerer, main
from pipelines.prompts import prompt_conversation
from pipelines.questions import supervised_spans


@pytest.fixture(scope="module")
def model_dir(tiny_dataset, tmp_path_factory):
    """An untrained model with the dataset's tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    manifest = Dataset(tiny_dataset).manifest
    ids = {f"im_{name}_token": manifest.special_tokens[f"<im_{name}>"] for name in ("patch", "start", "end")}
    ids |= {f"{name}_token_id": manifest.special_tokens[name] for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = OmniLMMConfig(**MODEL, **ids, vocab_size=manifest.vocab_size, num_query=manifest.num_query)
    OmniLMMForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tiny_dataset / "tokenizer", folder, dirs_exist_ok=True)
    (folder.parent / "cat.jpg").write_bytes(make_jpeg(1, 40, 32))
    return folder


@pytest.mark.parametrize("question", ["What is this?", "Left <image> or right <image>?"])
def test_the_prompt_is_the_start_of_the_training_sample(tiny_dataset, question):
    renderer = Renderer(load_tokenizer(tiny_dataset / "tokenizer"), num_query=4)
    images = ["a.jpg"] * max(1, question.count("<image>"))
    turns = [{"role": "user", "content": question}]
    prompt = renderer.render_prompt(prompt_conversation(turns, images))
    payload = {"messages": [*turns, {"role": "assistant", "content": "A cat."}], "images": images}
    trained = renderer.render(to_conversation(Record("x", "line 1", "x", payload)))
    start = int(np.argmax(trained.labels != -100))
    assert np.array_equal(prompt, trained.input_ids[:start])


def test_question_answer_truth(model_dir, capsys):
    image = str(model_dir.parent / "cat.jpg")
    arguments = ["--model", str(model_dir), "--image", image, "--question", "What?", "--max-new-tokens", "3"]
    assert main([*arguments, "--truth", "a cat", "--greedy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "question: What?" and lines[1].startswith("answer:") and lines[-1] == "truth:    a cat"


def test_a_file_of_questions_as_json_is_repeatable(model_dir, tmp_path, capsys):
    rows = [
        {"image": str(model_dir.parent / "cat.jpg"), "question": "What?", "truth": "a cat"},
        {"question": "No picture?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    arguments = ["--model", str(model_dir), "--questions", str(file), "--json", "--max-new-tokens", "4"]
    outputs = []
    for _ in range(2):  # sampled, with the same seed
        assert main(arguments) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert outputs[0] == outputs[1]
    assert [row["truth"] for row in outputs[0]] == ["a cat", None]


@pytest.mark.parametrize(
    ("image", "question", "expected"),
    [
        ("nowhere.jpg", "What?", "cannot read the image nowhere.jpg"),
        (__file__, "What?", "image"),
        (None, "Where is <image>?", "cannot be asked"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(model_dir, capsys, image, question, expected):
    arguments = ["--model", str(model_dir), "--question", question]
    assert main(arguments + (["--image", image] if image else [])) == 1
    assert expected in error_line(capsys.readouterr().err)


def test_chat_remembers_streams_and_ends_at_an_empty_line(model_dir, capsys, monkeypatch):
    """Scripted: the second prompt holds the first round, and what is streamed is what is remembered."""
    asked, questions = [], iter(["What?", "Really?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    reply = Answerer.reply

    def remember(self, turns, images, **options):
        asked.append([dict(turn) for turn in turns])
        return reply(self, turns, images, **options)

    monkeypatch.setattr(Answerer, "reply", remember)
    arguments = ["--model", str(model_dir), "--image", str(model_dir.parent / "cat.jpg")]
    assert main([*arguments, "--chat", "--max-new-tokens", "5"]) == 0
    assert [turn["content"] for turn in asked[0]] == ["What?"]
    first, answer, second = asked[1]
    assert (first["content"], second["content"]) == ("What?", "Really?") and answer["role"] == "assistant"
    streamed = capsys.readouterr().out
    assert streamed.count("model: ") == 2 and answer["content"] in streamed


def test_chat_ends_with_its_input(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["--model", str(model_dir), "--chat"]) == 0


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("num_questions", [1, 3])
def test_the_prompt_ids_are_the_training_ids_up_to_the_answer(num_images, system, num_questions):
    """With the real tokenizer: of every question of a conversation, whatever came before it."""
    tokenizer = load_tokenizer(golden_tokenizer_folder())
    renderer = Renderer(tokenizer, num_query=4)
    turns = [{"role": "system", "content": system}] if system else []
    pictures = [f"{number}.jpg" for number in range(num_images)]
    for number in range(num_questions):
        places = " <image>" * num_images if number == 0 and num_images > 1 else ""
        turns.append({"role": "user", "content": f" Question  {number}:{places}\nwhat\t?</s> "})
        turns.append({"role": "assistant", "content": f" Answer {number}.\n"})
    payload = {"messages": turns, "images": pictures}
    trained = renderer.render(to_conversation(Record("x", "line 1", "x", payload)))
    spans = supervised_spans(trained.labels)
    questions = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    assert len(spans) == len(questions) == num_questions and trained.num_images == num_images
    for number, (start, stop) in zip(questions, spans, strict=True):
        prompt = renderer.render_prompt(prompt_conversation(turns[: number + 1], pictures))
        assert prompt.tolist() == trained.input_ids[:start].tolist()
        answer = tokenizer.decode(trained.input_ids[start:stop], skip_special_tokens=False)
        assert answer.split() == f"{turns[number + 1]['content']}</s>".split()
