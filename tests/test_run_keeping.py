"""Signals at any moment, checkpoints that are damaged, resumes under other settings: one or several ranks."""

import importlib.machinery
import json
import os
import shutil
import signal
import socket
import sys
import types

import pytest
from ranks import start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipe import losses, tiny_recipe, write_recipe

from omnidata.loader import PackLoader
from omnidata.schema import UserError
from pipelines.checksums import verify
from pipelines.config import load_recipe
from pipelines.train import train


def recipe_for(dataset, run_dir, **sections):
    sections = {"optim": {"steps": 8}, "checkpoint": {"every": 2, "keep_last": 3}} | sections
    return write_recipe(run_dir.with_suffix(".yaml"), tiny_recipe(dataset, run_dir, **sections))


# --- signals ----------------------------------------------------------------------------------------------


def signal_itself(when, number):
    """Plant a signal to this process at a moment that only chance would hit."""
    import pipelines.evaluate as evaluate
    import pipelines.parallel as parallel
    import pipelines.train as training

    count = 0

    def planted(function):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == 2:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return run

    if when == "evaluation":
        evaluate.Evaluation.run = planted(evaluate.Evaluation.run)
    elif when == "vote":
        real = parallel.World.sum
        vote = planted(real)
        parallel.World.sum = lambda self, values: (vote if len(values) == 3 else real)(self, values)
    elif when == "export":
        real_export = training.export

        def export(*args, **kwargs):
            os.kill(os.getpid(), number)
            return real_export(*args, **kwargs)

        training.export = export


def one_rank(rank, size, port, recipe, when, number):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if rank == size - 1:
        signal_itself(when, number)
    train(load_recipe(recipe))


def run_ranks(recipe, when, number, size=2):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start(one_rank, rank, size, port, recipe, when, number) for rank in range(size)]
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.parametrize(
    ("when", "strategy", "number"),
    [
        ("evaluation", "ddp", signal.SIGTERM),
        ("vote", "fsdp", signal.SIGINT),
        ("export", "ddp", signal.SIGTERM),
    ],
)
def test_a_signal_to_one_rank_at_any_moment_stops_all_after_the_same_step(
    tiny_dataset, tmp_path, when, strategy, number
):
    run_dir = tmp_path / "run"
    recipe = recipe_for(
        tiny_dataset,
        run_dir,
        data={"train": [{"path": str(tiny_dataset)}], "val": [{"path": str(tiny_dataset), "split": "val"}]},
        parallel={"strategy": strategy},
        eval={"every": 2, "num_batches": 2, "num_questions": 0},
        checkpoint={"every": 0},
        guard={"step_timeout": 60.0},
    )
    assert run_ranks(recipe, when, number) == [0, 0]
    if when == "export":  # too late to stop: the run ends as if nothing had been
        assert (run_dir / "final" / "model.safetensors").exists()
        return
    done = len(losses(run_dir))
    assert done < 8 and not (run_dir / "final").exists()
    assert (run_dir / "checkpoints" / f"step-{done:08d}").exists()


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(tiny_dataset, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    train(load_recipe(recipe_for(tiny_dataset, run_dir), ["run.stop_after=4"]))
    return run_dir


@pytest.fixture
def stopped(tiny_dataset, stopped_once, tmp_path):
    shutil.copytree(stopped_once, tmp_path / "run")
    return recipe_for(tiny_dataset, tmp_path / "run")


def damage(checkpoint, what):
    if what == "weights":
        path = next(checkpoint.glob("*.distcp"))
        data = bytearray(path.read_bytes())
        data[1000] ^= 0xFF
        path.write_bytes(data)
    else:
        (checkpoint / what).write_bytes(b"\xff\xfe no text")


@pytest.mark.parametrize("what", ["weights", "COMPLETE", "sha256sums"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_its_step_is_passed(
    stopped, stopped_once, tmp_path, what
):
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "step-00000004", what)
    train(load_recipe(stopped, ["run.stop_after=6"]))
    names = sorted(path.name for path in folder.iterdir())
    assert ".damaged-step-00000004" in names and {"step-00000002", "step-00000004", "step-00000006"} <= set(
        names
    )
    assert all(verify(folder / name) is None for name in names if name.startswith("step-"))
    assert losses(tmp_path / "run")[:4] == losses(stopped_once)


def test_without_any_whole_checkpoint_nothing_is_begun_and_nothing_erased(stopped, tmp_path):
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        damage(path, "weights")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint that is whole"):
            train(load_recipe(stopped))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_false_does_not_write_over_a_run(stopped):
    with pytest.raises(UserError, match=r"run\.resume is false"):
        train(load_recipe(stopped, ["run.resume=false"]))


def test_what_changed_since_the_checkpoint_is_told(stopped, capfd):
    train(load_recipe(stopped, ["optim.lr=1e-4", "run.stop_after=5"]))
    assert "changed since that checkpoint: optim.lr: 0.003 -> 0.0001" in capfd.readouterr().out


def test_a_refused_state_names_the_key_that_changed(stopped):
    with pytest.raises(UserError, match=r"What changed: data\.max_tokens: 192 -> 256\."):
        train(load_recipe(stopped, ["data.max_tokens=256"]))


def test_another_global_batch_goes_on_to_the_end_of_the_data(tiny_dataset, tmp_path):
    run_dir = tmp_path / "run"
    recipe = recipe_for(tiny_dataset, run_dir, optim={"steps": None, "epochs": 2, "warmup_steps": 0})
    train(load_recipe(recipe, ["run.stop_after=1"]))
    train(load_recipe(recipe, ["data.global_batch=3"]))
    loader = PackLoader(tiny_dataset, global_batch=4, max_tokens=192, num_epochs=2)
    packs = loader.plan.totals.num_packs
    assert len(losses(run_dir)) == 1 + -(-(packs - 4) // 3) + -(-packs // 3)
    assert (run_dir / "final").exists()


def test_other_weights_under_the_same_path_are_refused(tiny_dataset, tmp_path):
    train(load_recipe(recipe_for(tiny_dataset, tmp_path / "base", optim={"steps": 1, "warmup_steps": 0})))
    start_from = shutil.copytree(tmp_path / "base" / "final", tmp_path / "weights")
    recipe = recipe_for(
        tiny_dataset, tmp_path / "run", model={"path": str(start_from), "freeze": ["vision_tower"]}
    )
    train(load_recipe(recipe, ["run.stop_after=2"]))
    path = start_from / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.path changed"):
        train(load_recipe(recipe))


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"steps": None, "epochs": 1, "warmup_steps": 5000}, "warmup_steps is 5000"),
        (
            {"steps": None, "epochs": 1, "warmup_steps": 0, "schedule": "wsd", "decay_steps": 5000},
            "decay_steps is 5000",
        ),
        ({"steps": 4, "warmup_steps": 4}, "warmup_steps is 4 and the run has 4 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_any_model_work(
    tiny_dataset, tmp_path, optim, expected
):
    with pytest.raises(UserError, match=expected):
        train(load_recipe(recipe_for(tiny_dataset, tmp_path / "run", optim=optim)))


def test_a_marker_that_is_a_folder_is_damage(stopped, tmp_path):
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "COMPLETE").unlink()
    (newest / "COMPLETE").mkdir()
    train(load_recipe(stopped, ["run.stop_after=5"]))
    assert (newest.parent / ".damaged-step-00000004").exists()


def test_a_run_whose_checkpoints_were_removed_does_not_begin_anew(stopped, tmp_path):
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for _ in range(2):  # the first try makes the folder again
        with pytest.raises(UserError, match="this run had checkpoints there"):
            train(load_recipe(stopped))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tiny_dataset, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n')
    train(load_recipe(recipe_for(tiny_dataset, run_dir), ["run.stop_after=2"]))
    assert len(losses(run_dir)) == 2
    (aside,) = run_dir.glob("metrics.before-*.jsonl")
    assert aside.read_text() == '{"step": 1, "loss": 7.0}\n'


def test_viewers_show_each_step_once_after_a_restart(tiny_dataset, tmp_path):
    recipe = recipe_for(tiny_dataset, tmp_path / "run", log={"tensorboard": True}, checkpoint={"every": 2})
    train(load_recipe(recipe, ["run.stop_after=4"]))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")  # as if killed before it was written
    train(load_recipe(recipe, ["run.stop_after=6"]))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_every_evaluation_is_made_once_also_if_the_run_stopped_before_it(tiny_dataset, tmp_path):
    """At step 4 both are due, and the pause comes between; the finished run is started a third time."""
    data = {"train": [{"path": str(tiny_dataset)}], "val": [{"path": str(tiny_dataset), "split": "val"}]}
    figures = []
    for name, stops in (("whole", []), ("run", ["run.stop_after=4"])):
        recipe = recipe_for(tiny_dataset, tmp_path / name, data=data, eval={"every": 2, "num_batches": 2})
        for overrides in (stops, [], []):
            train(load_recipe(recipe, overrides))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        figures.append([(line["step"], line["val_loss"]) for line in lines if "val_loss" in line])
    assert figures[0] == figures[1] and [step for step, _ in figures[0]] == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_restart_goes_on_with_the_trackers_run(tiny_dataset, tmp_path, monkeypatch, name):
    calls = []  # neither package is a dependency: the arguments that both document are what is ours
    tracker = types.SimpleNamespace(
        __spec__=importlib.machinery.ModuleSpec(name, None),
        init=lambda **arguments: calls.append(arguments),
        log=lambda *_, **__: None,
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    recipe = recipe_for(tiny_dataset, tmp_path / "run", log={"tracker": name})
    for last in (1, 2):
        train(load_recipe(recipe, [f"run.stop_after={last}"]))
    first, second = ({key: call.get(key) for key in ("id", "name", "resume")} for call in calls)
    assert first == second and first["resume"] == "allow" and (first["id"] is not None) == (name == "wandb")
