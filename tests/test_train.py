"""What a run refuses, tells, survives and leaves behind."""

import contextlib
import functools
import gc
import json
import resource
import shutil
import sys
import time

import pytest
import torch
from messages import error_line
from ranks import run_on_ranks, start
from safetensors.torch import load_file
from tiny_recipe import losses, tiny_recipe, write_recipe

from omnidata import Dataset
from omnidata.schema import UserError
from omnimodel import OmniLMMForCausalLM
from omnimodel.blocks import compile_blocks
from pipelines.config import load_recipe, parse_recipe
from pipelines.guard import LossGuard, Watchdog
from pipelines.train import main, marking_last, train


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory):
    """A whole run with validation, viewer and plot."""
    run_dir = tmp_path_factory.mktemp("train") / "run"
    tree = tiny_recipe(
        tiny_dataset,
        run_dir,
        data={
            "train": [{"path": str(tiny_dataset)}],
            "val": [{"path": str(tiny_dataset), "split": "val"}],
        },
        optim={"steps": 12},
        eval={"every": 6, "num_questions": 6},
        log={"tensorboard": True, "plot": True},
    )
    train(load_recipe(write_recipe(run_dir.with_suffix(".yaml"), tree)))
    return run_dir


def test_the_loss_falls_and_every_step_has_a_line(finished):
    values = losses(finished)
    assert len(values) == 12 and values[-1] < values[0] - 0.5
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    assert first["tokens"] > 0 and first["images"] > 0 and first["supervised_tokens"] > 0
    assert first["tokens_per_s"] == pytest.approx(first["tokens"] / first["seconds"], rel=1e-2)
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert {"val_loss", "val_accuracy", "val_f1"} <= evaluations[0].keys()


def test_it_leaves_a_model_that_loads_with_its_tokenizer_card_and_pictures(finished, tiny_dataset):
    final = finished / "final"
    model = OmniLMMForCausalLM.from_pretrained(final)
    weights = load_file(final / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for file in (tiny_dataset / "tokenizer").iterdir():
        assert (final / file.name).read_bytes() == file.read_bytes()
    card = (final / "README.md").read_text()
    from omnidata import Dataset

    assert Dataset(tiny_dataset, "train").digest in card and "Lowest validation loss" in card
    assert (finished / "loss.svg").read_text().count("<polyline") == 3
    assert list((finished / "tensorboard").glob("events*"))


def test_a_finished_run_does_nothing_more(finished, capfd):
    before = losses(finished)
    train(load_recipe(finished.with_suffix(".yaml"), ["eval.num_questions=0"]))
    assert losses(finished) == before
    assert "resumed after step 12" in capfd.readouterr().out


def test_every_mismatch_in_one_message_before_any_model_work(tiny_dataset, tmp_path):
    model = {"num_query": 16, "vocab_size": 100, "im_patch_token": 7, "hidden": 3}
    tree = tiny_recipe(tiny_dataset, tmp_path / "run")
    tree["model"]["config"] |= model
    tree["model"]["config"]["mm_vision_tower"] = "no such tower"  # would fail if the model were built
    with pytest.raises(UserError) as error:
        train(parse_recipe(tree))
    message = str(error.value)
    for expected in ("num_query 4, but the model has 16", "but the model's is 100", "im_patch_token is 7"):
        assert expected in message
    assert "model.config.hidden: OmniLMMConfig has no such field" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.val=[{path: missing-val}]", ["missing-train", "missing-val"]),
        ("model={path: nowhere}", ["missing-train"]),
    ],
)
def test_all_missing_datasets_in_one_message(tiny_dataset, tmp_path, override, expected):
    tree = tiny_recipe(tmp_path / "missing-train", tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(load_recipe(write_recipe(tmp_path / "r.yaml", tree), [override]))
    assert all(name in str(error.value) for name in expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model={path: nowhere}", "nowhere is no model folder"),
        ("model.config.hidden_size=33", "embed_dim=33 must be divisible"),
        ("model.config.mm_vision_tower=nosuch", "timm cannot build the vision tower 'nosuch'"),
    ],
)
def test_models_that_cannot_be_are_one_line(tiny_dataset, tmp_path, override, expected):
    tree = tiny_recipe(tiny_dataset, tmp_path / "run")
    with pytest.raises(UserError, match=expected):
        train(load_recipe(write_recipe(tmp_path / "r.yaml", tree), [override]))


def test_what_is_not_installed_is_said_with_all_else(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tree = tiny_recipe(tiny_dataset, tmp_path / "run", log={"tracker": "trackio"}, model={"lora": {}})
    tree["model"]["config"]["num_query"] = 16
    with pytest.raises(UserError) as error:
        train(parse_recipe(tree))
    for expected in ("num_query", "omnilmm-toolkit[trackio]", "omnilmm-toolkit[peft]"):
        assert expected in str(error.value)


@pytest.mark.slow
def test_compiled_blocks_lose_alike_and_keep_their_names(tiny_dataset, tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, without the C++ compiler, which takes minutes for this."""
    ahead = functools.partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr("pipelines.model.compile_blocks", ahead)
    for name, compiled in (("plain", False), ("compiled", True)):
        tree = tiny_recipe(tiny_dataset, tmp_path / name, optim={"steps": 3}, model={"compile": compiled})
        train(parse_recipe(tree))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    plain, compiled = (torch.tensor(losses(tmp_path / name)) for name in ("plain", "compiled"))
    torch.testing.assert_close(plain, compiled, rtol=0, atol=2e-5)
    OmniLMMForCausalLM.from_pretrained(tmp_path / "compiled/final")  # refuses names that it does not know


def test_profile_is_a_flag(tiny_dataset, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(tiny_dataset, tmp_path / "run"))
    assert main([str(recipe), "--profile", "optim.steps=7"]) == 0
    assert json.loads((tmp_path / "run/profile/rank0.json").read_text())["traceEvents"]


def test_a_model_with_another_tokenizer_is_refused(finished, tiny_dataset, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(finished / "final", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    )
    tree = tiny_recipe(tiny_dataset, tmp_path / "run", model={"path": str(other)})
    with pytest.raises(UserError, match="tokenizer"):
        train(parse_recipe(tree))


def test_one_clear_line_and_exit_1(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert error_line(capsys.readouterr().err).startswith("error: recipe")
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_fatal(tiny_dataset, tmp_path):
    tree = tiny_recipe(
        tiny_dataset,
        tmp_path / "run",
        optim={
            "lr": 1e30,
            "warmup_steps": 0,
            "schedule": "constant",
        },  # the second step sees infinite weights
        guard={"max_nonfinite": 3},
    )
    with pytest.raises(UserError, match="not finite 3 steps in a row"):
        train(parse_recipe(tree))
    assert [loss is None for loss in losses(tmp_path / "run")] == [False, True, True, True]
    lines = (tmp_path / "run/suspicious-samples-rank0.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 3, 4] and all(row["keys"] for row in rows)


def test_an_unreadable_sample_stops_the_run_or_is_counted_as_the_recipe_says(tiny_dataset, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    row = Dataset(data, "train").rows([1])[0]  # it has one picture, the last of its bytes
    with (data / row["shard"]).open("r+b") as shard:
        shard.seek(row["offset"] + row["nbytes"] - 700)
        shard.write(bytes(700))
    optim = {"epochs": 1, "steps": None, "warmup_steps": 0}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_recipe(data, tmp_path / "run", optim=optim))
    assert main([str(recipe)]) == 1
    assert row["key"] in error_line(capfd.readouterr().err)
    assert main([str(recipe), "data.on_error=skip", f"run.dir={tmp_path / 'skipping'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "skipping/metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped_samples", 0) for line in lines) == 1
    assert "1 unreadable samples left out" in capfd.readouterr().out


def test_a_loss_spike_names_its_samples(tmp_path):
    guard = LossGuard(parse_recipe(tiny_recipe(tmp_path, tmp_path)).guard, tmp_path, rank=0)
    assert guard.finite(1, 2.0, ["a"]) is None
    assert guard.finite(2, 3.0, ["b"]) is None
    assert "over 2x its mean" in guard.finite(3, 9.0, ["c"])
    assert json.loads((tmp_path / "suspicious-samples-rank0.jsonl").read_text())["keys"] == ["c"]


def train_with_room_for(num_bytes, recipe, error_file):
    """As ``train.py`` would, where no file may grow beyond ``num_bytes``: in a process of its own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    with error_file.open("w") as file, contextlib.redirect_stderr(file):
        code = main([str(recipe)])
    sys.exit(code)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_leaves_the_others(tiny_dataset, tmp_path):
    tree = tiny_recipe(tiny_dataset, tmp_path / "run", checkpoint={"every": 2})
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    train(load_recipe(recipe, ["run.stop_after=2"]))
    process = start(train_with_room_for, 100_000, recipe, tmp_path / "stderr")
    process.join(timeout=60)
    assert process.exitcode == 1
    message = error_line((tmp_path / "stderr").read_text())
    assert message.startswith("error: the checkpoint of step 4 could not be written")
    assert "File too large" in message
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    train(load_recipe(recipe))
    assert len(losses(tmp_path / "run")) == 6


def stall(run_dir):
    """A loop that does not come round: in a process of its own."""
    recipe = parse_recipe(
        tiny_recipe(run_dir, run_dir, guard={"first_step_timeout": 60, "step_timeout": 0.3})
    )
    Watchdog(recipe.guard, run_dir, rank=0).step_finished()
    time.sleep(60)


def test_the_watchdog_dumps_the_stacks_and_ends_the_process(tmp_path):
    process = start(stall, tmp_path)
    process.join(timeout=30)
    assert process.exitcode == 1
    assert "in stall" in (tmp_path / "stalled-rank0.txt").read_text()


# --- starting from weights --------------------------------------------------------------------------------


def lora(target="q_proj"):
    return {"rank": 4, "target_modules": [target]}


@pytest.mark.slow
def test_shards_loaded_from_safetensors_equal_the_whole_model(finished, tiny_dataset, tmp_path):
    """Meta device, FSDP, every rank reads its rows: the same run as from the model in memory."""
    pytest.importorskip("peft")
    paths = {}
    for name, extra in (("plain", {}), ("lora", {"lora": lora()})):
        for run in ("one", "two"):
            model = {"path": str(finished / "final"), "freeze": ["vision_tower"], **extra}
            tree = tiny_recipe(tiny_dataset, tmp_path / f"{name}-{run}", model=model, optim={"steps": 3})
            paths[name, run] = write_recipe(tmp_path / f"{name}-{run}.yaml", tree)
    run_on_ranks(2, [paths["plain", "two"], paths["lora", "two"]])
    train(load_recipe(paths["plain", "one"]))
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "plain-two")),
        torch.tensor(losses(tmp_path / "plain-one")),
        rtol=0,
        atol=3e-6,
    )
    train(load_recipe(paths["lora", "one"]))
    # Adapters start at zero, so the first loss is the model's own, whatever A is.
    assert losses(tmp_path / "lora-two")[0] == pytest.approx(losses(tmp_path / "plain-one")[0], abs=3e-6)
    start_weights, merged = (
        load_file(p / "model.safetensors") for p in (finished / "final", tmp_path / "lora-two/final")
    )
    changed = {name for name in merged if not torch.equal(merged[name], start_weights[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not any("k_proj" in name or "vision_tower" in name for name in changed)
    model = OmniLMMForCausalLM.from_pretrained(tmp_path / "lora-two" / "final")
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_script_runs_from_another_folder(tiny_dataset, tmp_path):
    import subprocess

    from tiny_recipe import ROOT

    result = subprocess.run(
        [sys.executable, str(ROOT / "pipelines/train.py"), "nowhere.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "error: recipe nowhere.yaml does not exist" in result.stderr


def test_a_gpu_without_memory_names_the_pack(tiny_dataset, tmp_path, monkeypatch):
    def model_inputs(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("pipelines.train.model_inputs", model_inputs)
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tiny_recipe(tiny_dataset, tmp_path / "run")))
    with pytest.raises(UserError, match=r"tokens and \d+ images \(samples sample-0.*data.max_tokens.*2 GiB"):
        train(recipe)
    assert gc.isenabled()


def test_a_step_is_read_one_microbatch_ahead():
    taken = []

    def stream():
        for number in range(4):
            taken.append(number)
            yield number

    seen = [(number, is_last, len(taken)) for number, is_last in marking_last(stream())]
    assert seen == [(0, False, 2), (1, False, 3), (2, False, 4), (3, True, 4)]
