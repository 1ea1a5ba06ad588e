"""train.py, generate.py, evaluate.py and plan_memory.py with any class, on a processor's data."""

from __future__ import annotations

import json

import numpy as np
import processors
import pytest
import torch
import transformers
import yaml
from ranks import run_on_ranks
from torch.utils.flop_counter import FlopCounterMode

from omnidata import Dataset
from omnidata.loader import PackLoader
from omnidata.schema import UserError
from omnimodel.packed import class_for, config_of
from pipelines import evaluate, generate, plan_memory
from pipelines.config import parse_recipe
from pipelines.data import model_inputs
from pipelines.evaluate import load_for_answers
from pipelines.flops import count_flops
from pipelines.model import new_model
from pipelines.questions import questions_of
from pipelines.train import train

CPU = torch.device("cpu")


def load(folder):
    config = config_of(str(folder / "model"))
    return class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32)


def recipe_tree(folder, out, **sections):
    tree = {
        "run": {"dir": str(out), "device": "cpu", "threads": 1},
        "data": {
            "train": [{"path": str(folder / "data")}],
            **{"max_tokens": 512, "global_batch": 2, "num_workers": 0},
        },
        "model": {"path": str(folder / "model")},
        "optim": {"lr": 1e-3, "steps": 4},
        "checkpoint": {"every": 2},
        "log": {},
        "parallel": {},
    }
    for section, values in sections.items():
        tree[section] |= values
    return tree


def run(folder, out, **sections):
    train(parse_recipe(recipe_tree(folder, out, **sections)))
    return transformers.AutoModelForImageTextToText.from_pretrained(out / "final", dtype=torch.float32)


def test_a_run_that_stops_and_goes_on_is_one_that_never_stopped(family, tmp_path):
    """With a layer behind the one that is used (LLaVA's): it takes no part, and is as it was at the end."""
    folder = family("llava_onevision")
    whole = run(folder, tmp_path / "whole").state_dict()
    run_dir = tmp_path / "halves"
    with pytest.raises(OSError):
        run(folder, run_dir, run={"stop_after": 2})  # no RUN/final yet
    halves = run(folder, run_dir).state_dict()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    before = load(folder).state_dict()
    name = "model.vision_tower.post_layernorm.weight"
    assert torch.equal(before[name], whole[name])
    assert not torch.equal(before["lm_head.weight"], whole["lm_head.weight"])
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "whole" / "final")
    assert type(processor) is type(processors.make("llava_onevision", small=True))


def test_a_bfloat16_run_reads_its_shards_from_files_of_other_names(family, tmp_path):
    """FSDP over one rank: meta device, renamed keys, buffers made anew; as close as bfloat16 allows."""
    folder = family("gemma3")
    exact = run(folder, tmp_path / "exact").state_dict()
    half = run(
        folder,
        tmp_path / "half",
        run={"dtype": "bfloat16"},
        model={"activation_checkpointing": "selective", "freeze": ["vision_tower"]},
    ).state_dict()
    before = load(folder).state_dict()
    for name, tensor in half.items():
        if "vision_tower" in name:
            torch.testing.assert_close(tensor, before[name], atol=2e-3, rtol=1e-2)
        else:
            torch.testing.assert_close(tensor, exact[name], atol=6e-3, rtol=2e-2)


def test_adapters_and_rates_by_part(family, tmp_path, capsys):
    pytest.importorskip("peft")
    folder = family("qwen3_vl")
    tuned = run(
        folder,
        tmp_path / "lora",
        model={"freeze": ["vision_tower", "embeddings", "lm_head"], "lora": {"rank": 2}},
        optim={"component_lr": {"connector": 1e-2}},
        log={"by": "dataset"},
    ).state_dict()
    rows = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        [(name, loss)] = [(name, value) for name, value in row.items() if name.startswith("loss/")]
        assert loss == pytest.approx(row["loss"], rel=1e-5)
        assert row[name.replace("loss/", "tokens/")] == row["tokens"]
    assert "connector" in capsys.readouterr().out
    before = load(folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert any("language_model.layers" in name and "q_proj" in name for name in changed)
    assert any("merger" in name for name in changed)
    assert not any("blocks" in name or "embed" in name or "lm_head" in name for name in changed)


def test_what_does_not_fit_is_named(family, tmp_path):
    folder, other = family("qwen3_vl"), family("gemma3")
    with pytest.raises(UserError, match="its processor is not the one of"):
        run(folder, tmp_path / "a", model={"path": str(other / "model")})
    with pytest.raises(UserError, match=r"model\.config\.text_config\.hiden_size: .* no such field"):
        run(folder, tmp_path / "b", model={"path": None, "config": {"text_config": {"hiden_size": 8}}})
    with pytest.raises(
        UserError, match="no component resampler to freeze; there are vision_tower, connector"
    ):
        run(folder, tmp_path / "c", model={"freeze": ["resampler"]})
    mixed = [{"path": str(folder / "data")}, {"path": str(other / "data")}]
    with pytest.raises(UserError, match="built for different models"):
        run(folder, tmp_path / "d", data={"train": mixed})


def test_random_weights_from_a_changed_configuration(family, tmp_path):
    folder = family("qwen3_vl")
    model = run(
        folder,
        tmp_path / "run",
        model={"path": None, "config": {"text_config": {"num_hidden_layers": 1}}},
        optim={"steps": 1},
    )
    assert model.config.get_text_config().num_hidden_layers == 1


SLOW = pytest.mark.slow
RANKS = [
    ("internvl", "fsdp"),
    *(pytest.param(name, "fsdp", marks=SLOW) for name in ("qwen3_vl", "minicpmv4_6")),
]


@pytest.mark.parametrize(("name", "strategy"), [*RANKS, pytest.param("llava_onevision", "ddp", marks=SLOW)])
def test_two_ranks_are_one_process(family, tmp_path, name, strategy):
    """One of them has no pictures in one step, or nothing at all."""
    folder = family(name)
    longest = max(len(sample.input_ids) for sample in Dataset(folder / "data"))
    data = {"max_tokens": longest, "global_batch": 2}
    ranks = [
        list(PackLoader(folder / "data", **data, num_epochs=1, rank=rank, world_size=2, dummy_picture=True))
        for rank in range(2)
    ]
    steps = len(ranks[0])
    assert any(a.has_dummy != b.has_dummy for a, b in zip(*ranks, strict=True))
    sections = {"data": data, "optim": {"steps": steps}, "parallel": {"strategy": strategy}}
    one = run(folder, tmp_path / "one", data=data, optim={"steps": steps}).state_dict()
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, tmp_path / "two", **sections)))
    run_on_ranks(2, [path])
    final = tmp_path / "two" / "final"
    two = transformers.AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).state_dict()
    for parameter, expected in one.items():
        torch.testing.assert_close(two[parameter], expected, atol=5e-5, rtol=1e-4)


# --- the other scripts ------------------------------------------------------------------------------------


def test_a_trained_model_is_asked_as_it_was_trained(family, ten_records, tmp_path, capsys):
    """Ids of a prompt are those of the sample; both scripts answer, about a picture and about its swap."""
    folder = family("qwen3_vl")
    run(folder, tmp_path / "run", optim={"steps": 1})
    final = str(tmp_path / "run" / "final")
    prompts = load_for_answers(final, device="cpu", dtype="float32")
    dataset = Dataset(folder / "data")
    assert prompts.end_tokens[0] == dataset.manifest.end_of_turn[0]
    for number in (1, 2):
        sample = dataset[dataset.index["id"].to_pylist().index(f"r{number}")]
        names = [str(ten_records / f"{(number + k) % 4}.jpg") for k in range(number)]
        question = "<image>" * number + f"What is number {number}?"
        ids, stored = prompts.prompt([{"role": "user", "content": question}], names)
        start = int(np.argmax(sample.labels != -100))
        assert ids.tolist() == sample.input_ids[:start].tolist() and len(stored) == number
    keys = dict(zip(dataset.index["id"].to_pylist(), dataset.index["key"].to_pylist(), strict=True))
    questions = [q for q in questions_of(dataset, prompts, with_text_only=True) if q.key == keys["r9"]]
    assert [len(question.images) for question in questions] == [0, 1]
    asked = [
        "--model",
        final,
        "--image",
        names[0],
        "--question",
        "What?",
        "--greedy",
        "--max-new-tokens",
        "2",
    ]
    capsys.readouterr()
    assert generate.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "What?"
    arguments = ["--model", final, "--data", str(folder / "data"), "--batch-size", "4", "--swap-images"]
    assert evaluate.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    with_pictures = sum(sample.images != () for sample in dataset)
    assert report["num_questions"] == with_pictures and 2 <= report["num_swapped"] < with_pictures
    other = family("gemma3")
    assert evaluate.main(["--model", final, "--data", str(other / "data")]) == 1
    assert "tokenize differently" in capsys.readouterr().err


COUNTED = ("qwen2_5_vl", "qwen3_vl", "internvl", "pixtral")  # joins of patches, MiniCPM's, are counted high
MORE_COUNTED = ("smolvlm", "llava_onevision", "lfm2_vl", "gemma3")


@pytest.mark.parametrize("name", [*COUNTED, *(pytest.param(name, marks=SLOW) for name in MORE_COUNTED)])
def test_flops_are_those_that_torch_counts(family, name):
    folder = family(name)
    model = load(folder).train()
    count = count_flops(model)
    [microbatch] = PackLoader(folder / "data", global_batch=1, max_tokens=4096, num_epochs=1)
    with FlopCounterMode(display=False) as counter:
        model(**model_inputs(microbatch, CPU)).loss.backward()
    assert count.microbatch(microbatch) == pytest.approx(counter.get_total_flops(), rel=0.1)
    # and packs are dealt by them: a document's and a picture's share, in tokens
    weights, token = count.token_weights, count.of([1], images=0, supervised=0)
    document = 300 + weights["attention_cost"] * 300**2
    assert token * document == pytest.approx(count.of([300], images=0, supervised=0), rel=0.01)
    picture = count.of([], images=1, supervised=0, pixel_values=3 * 448**2)
    assert token * weights["image_cost"] == pytest.approx(picture, rel=0.01)


def test_the_planner_takes_the_costliest_pack_and_weighs_it_by_the_average(family, tmp_path):
    folder = family("qwen3_vl")
    recipe = parse_recipe(recipe_tree(folder, tmp_path / "run", data={"max_tokens": 256}))
    [figures] = plan_memory.plan(recipe, gpus=[1])
    parameters = sum(p.numel() for p in load(folder).parameters())
    held = figures["memory"]
    assert held["parameters"] >= 4 * parameters and held["optimizer"] >= 8 * parameters
    loader = PackLoader(folder / "data", global_batch=1, max_tokens=256, num_epochs=1)
    count = count_flops(load(folder))
    flops = [count.microbatch(microbatch) for microbatch in loader]
    assert figures["step_flops"] / recipe.data.global_batch == pytest.approx(np.mean(flops), rel=0.25)
    assert figures["steps"] == 4


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_master_weights_are_float32_whatever_a_config_says_of_its_parts(family, name):
    """Published configurations say bfloat16, and say it of their parts."""
    config = config_of(str(family(name) / "model"))
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.bfloat16
    with torch.device("meta"):
        model = new_model(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dropout_of_attention_is_refused_before_anything_runs(family, tmp_path):
    folder = family("internvl")
    changed = {"path": None, "config": {"vision_config": {"attention_dropout": 0.1}}}
    with pytest.raises(UserError, match=r"vision_config\.attention_dropout is 0\.1"):
        run(folder, tmp_path / "run", model=changed)
