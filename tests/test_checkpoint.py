"""A run that is killed, stopped or damaged goes on exactly where it was."""

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks, run_recipes, start
from safetensors.torch import load_file
from tiny_recipe import losses, tiny_recipe, write_recipe
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from omnidata.schema import UserError
from pipelines import checkpoint
from pipelines.checkpoint import rng_state, set_rng_state
from pipelines.checkpoint_reader import CheckpointReader, _Unpickler
from pipelines.checksums import verify
from pipelines.config import load_recipe
from pipelines.train import train

STEPS = 12


def recipe_for(dataset, run_dir, **sections):
    sections = {"optim": {"steps": STEPS}, "checkpoint": {"every": 3, "keep_last": 2}} | sections
    return write_recipe(run_dir.with_suffix(".yaml"), tiny_recipe(dataset, run_dir, **sections))


def weights(run_dir):
    return load_file(run_dir / "final" / "model.safetensors")


def assert_bit_equal(run_dir, other):
    assert losses(run_dir) == losses(other)
    mine, theirs = weights(run_dir), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(load_recipe(recipe_for(tiny_dataset, run_dir)))
    return run_dir


def wait_for_line(run_dir, number, process):
    """Until metrics.jsonl has ``number`` lines."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        if path.exists() and path.read_text().count("\n") >= number:
            return
        time.sleep(0.002)
    raise AssertionError("the run ended or hung before it was disturbed")


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_killed_and_resumed_equals_never_killed(tiny_dataset, undisturbed, tmp_path, number):
    recipe = recipe_for(tiny_dataset, tmp_path / "run")
    process = start(run_recipes, [recipe])
    wait_for_line(tmp_path / "run", number, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(losses(tmp_path / "run")) < STEPS, "killed too late to prove anything"
    train(load_recipe(recipe))
    assert_bit_equal(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_preemption_finishes_the_step_saves_and_exits_0(tiny_dataset, undisturbed, tmp_path, number, workers):
    """Once with a worker: starting one takes longer than the whole run."""
    recipe = recipe_for(tiny_dataset, tmp_path / "run", checkpoint={"every": 0})
    process = start(run_recipes, [recipe], [f"data.num_workers={workers}"])
    wait_for_line(tmp_path / "run", 2, process)
    # A scheduler signals every process of the job, the loader's workers first here.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children or not workers
    for pid in [*map(int, children), process.pid]:
        with contextlib.suppress(ProcessLookupError):  # it may have just ended
            os.kill(pid, number)
    process.join()
    assert process.exitcode == 0
    done = len(losses(tmp_path / "run"))
    assert 2 <= done < STEPS
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert not (tmp_path / "run" / "final").exists()
    train(load_recipe(recipe))
    assert_bit_equal(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def paused_once(tiny_dataset, tmp_path_factory):
    """A run stopped after step 7, with checkpoints of steps 6 and 7."""
    run_dir = tmp_path_factory.mktemp("paused") / "run"
    train(load_recipe(recipe_for(tiny_dataset, run_dir), ["run.stop_after=7"]))
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000007"]
    return run_dir


@pytest.fixture
def paused(tiny_dataset, paused_once, tmp_path):
    """The recipe of a copy of it."""
    shutil.copytree(paused_once, tmp_path / "run")
    return recipe_for(tiny_dataset, tmp_path / "run")


@pytest.mark.parametrize("damage", ["flip", "truncate", "no marker", "leftover"])
def test_a_damaged_checkpoint_is_passed_over(paused, undisturbed, tmp_path, damage, capfd):
    newest = tmp_path / "run/checkpoints/step-00000007"
    [data] = newest.glob("*.distcp")
    raw = bytearray(data.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        data.write_bytes(raw)
    elif damage == "truncate":
        data.write_bytes(raw[:-1])
    elif damage == "no marker":
        (newest / "COMPLETE").unlink()
    else:  # killed before the rename
        newest.rename(newest.with_name(".tmp-step-00000007"))
    train(load_recipe(paused))
    output = capfd.readouterr()
    assert "resumed after step 6" in output.out
    assert ("is not used" in output.err) == (damage != "leftover")
    assert_bit_equal(tmp_path / "run", undisturbed)
    assert verify(tmp_path / "run/checkpoints" / f"step-{STEPS:08d}") is None
    assert not list((tmp_path / "run/checkpoints").glob(".tmp-*"))


def test_other_world_size_gets_the_same_global_batches(paused, undisturbed, tmp_path):
    run_on_ranks(2, [paused])
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(undisturbed)), rtol=0, atol=5e-6
    )


def test_the_moments_decide_how_a_run_goes_on(paused, undisturbed, tmp_path, monkeypatch):
    """Without Adam's moments the continuation differs: the comparisons above can fail."""
    restore = checkpoint.set_optimizer_state_dict

    def forgetful(model, optimizer, state):
        for moments in state["state"].values():
            moments["exp_avg"].zero_()
        restore(model, optimizer, state)

    monkeypatch.setattr(checkpoint, "set_optimizer_state_dict", forgetful)
    train(load_recipe(paused))
    mine, theirs = losses(tmp_path / "run"), losses(undisturbed)
    assert mine[:8] == theirs[:8] and mine[8:] != theirs[8:]


def test_a_run_from_the_start_is_the_same_again(paused, undisturbed, tmp_path):
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/has-checkpoints").unlink()  # else refused
    train(load_recipe(paused))
    assert losses(tmp_path / "run") == losses(undisturbed)  # from the start, it is the same run again
    assert len(losses(tmp_path / "run")) == STEPS, "repeated steps must not stand in the log twice"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=1", "run.seed: 0 in the checkpoint, now 1"),
        ("model.freeze=[vision_tower]", "model.freeze"),
        ("data.max_tokens=200", "max_tokens"),
    ],
)
def test_another_recipe_is_refused(paused, override, expected):
    with pytest.raises(UserError, match=expected):
        train(load_recipe(paused, [override]))


def test_best_checkpoint_is_kept(tiny_dataset, tmp_path):
    """With a learning rate that ruins the model, the first evaluation stays the best."""
    tree = tiny_recipe(
        tiny_dataset,
        tmp_path / "run",
        data={"train": [{"path": str(tiny_dataset)}], "val": [{"path": str(tiny_dataset), "split": "val"}]},
        optim={"steps": 8, "lr": 10.0, "warmup_steps": 6},
        eval={"every": 1},
        checkpoint={"every": 1, "keep_last": 1},
    )
    train(load_recipe(write_recipe(tmp_path / "r.yaml", tree)))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(by_step, key=by_step.get)
    assert best < 8
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000008"]
    trainer = json.loads((tmp_path / "run/checkpoints/step-00000008/trainer.json").read_text())
    assert trainer["best"] == [by_step[best], best]


def test_saving_does_not_see_later_updates(tiny_dataset, tmp_path):
    """The asynchronous writer works on a copy: what it writes is the state of its step."""
    for name, asynchronous in (("behind", True), ("before", False)):
        recipe = recipe_for(
            tiny_dataset, tmp_path / name, checkpoint={"every": 5, "asynchronous": asynchronous}
        )
        train(load_recipe(recipe))
    files = [
        next((tmp_path / name / "checkpoints/step-00000010").glob("*.distcp"))
        for name in ("behind", "before")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rng_state_round_trip():
    state = rng_state()
    first = torch.rand(3)
    torch.rand(5)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


class _Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def _as_bytes(metadata):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata = dict.fromkeys(metadata.state_dict_metadata, BytesStorageMetadata())
    return metadata


def _planted(metadata, marker):
    metadata.planner_data = _Planted(marker)
    return metadata


@pytest.mark.parametrize("how", ["a call", "values to unpickle"])
def test_a_strangers_checkpoint_runs_no_code(how, tmp_path):
    marker, tensors = tmp_path / "ran", {"a": torch.ones(3)}
    dcp.save(tensors, checkpoint_id=tmp_path / "step", no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path / "step").read_metadata()
    metadata = _as_bytes(metadata) if how != "a call" else _planted(metadata, marker)
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = CheckpointReader(tmp_path / "step")
    with pytest.raises(UserError, match="which no checkpoint of a run holds"):
        reader.read_metadata()
    with pytest.raises(CheckpointException):
        dcp.load({"a": torch.zeros(3)}, storage_reader=reader, no_dist=True)
    assert not marker.exists()


class _Got:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_members_of_enumerations_are_read_as_older_pythons_write_them(tmp_path):
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT

    def unpickle(value):
        return _Unpickler(io.BytesIO(pickle.dumps(value))).load()

    assert unpickle(_Got(_MEM_FORMAT_ENCODING, member.name)) is member
    for planted in (_Got(Path, "unlink"), _Got(_MEM_FORMAT_ENCODING, "__subclasses__")):
        with pytest.raises(pickle.UnpicklingError, match="which no checkpoint of a run"):
            unpickle(planted)


def test_a_checkpoint_of_ours_is_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(tensors, checkpoint_id=tmp_path / "step", no_dist=True)
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(empty, storage_reader=CheckpointReader(tmp_path / "step"), no_dist=True)
    assert all(torch.equal(empty[name], tensors[name]) for name in tensors)
