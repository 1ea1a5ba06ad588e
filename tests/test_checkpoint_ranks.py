"""Checkpoints of several ranks: who hashes what, and what happens if one of them cannot write."""

import contextlib
import json
import os
import resource
import socket
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import start
from tiny_recipe import losses, tiny_recipe, write_recipe

from pipelines import train
from pipelines.checksums import CheckpointWriter, complete, verify


def one_rank(rank, size, port, recipe, plant):
    """As torchrun starts it, with its own standard error: RUN.errors-N holds it and the exit code."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    plant(rank, recipe)
    with recipe.with_suffix(f".errors-{rank}").open("w") as file, contextlib.redirect_stderr(file):
        code = train.main([str(recipe)])
    sys.exit(code)


def run_ranks(recipe, plant, size=2):
    """Exit codes and errors of each rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start(one_rank, rank, size, port, recipe, plant) for rank in range(size)]
    for process in processes:
        process.join(timeout=100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [recipe.with_suffix(f".errors-{rank}").read_text() for rank in range(size)]


def nothing(rank, recipe):
    """Plant nothing."""


# --- checksums --------------------------------------------------------------------------------------------


def write_down_opened_files(rank, recipe):
    opened = set()

    def hook(event, arguments):
        if event == "open" and str(arguments[0]).endswith(".distcp") and "/.tmp-" in str(arguments[0]):
            opened.add(os.path.basename(arguments[0]))
            recipe.with_suffix(f".opened-{rank}").write_text(json.dumps(sorted(opened)))

    sys.addaudithook(hook)


def test_each_rank_touches_and_hashes_only_what_it_writes(tiny_dataset, tmp_path):
    tree = tiny_recipe(
        tiny_dataset, tmp_path / "run", parallel={"strategy": "fsdp"}, optim={"steps": 1, "warmup_steps": 0}
    )
    recipe = write_recipe(tmp_path / "run.yaml", tree)
    assert run_ranks(recipe, write_down_opened_files)[0] == [0, 0]
    for rank in range(2):
        assert json.loads(recipe.with_suffix(f".opened-{rank}").read_text()) == [f"__{rank}_0.distcp"]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    names = {path.name for path in checkpoint.iterdir()} - {"sha256sums", "COMPLETE"}
    listed = [line.split("  ")[1] for line in (checkpoint / "sha256sums").read_text().splitlines()]
    assert listed == sorted(names) and {"__0_0.distcp", "__1_0.distcp", ".metadata"} < names
    assert verify(checkpoint) is None


def test_what_changes_between_the_write_and_the_list_is_found(tmp_path):
    folder = tmp_path / "step"
    dcp.save({"a": torch.ones(100)}, storage_writer=CheckpointWriter(folder), no_dist=True)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    complete(folder)
    assert verify(folder) == "__0_0.distcp does not have its checksum"


# --- a rank that cannot write -----------------------------------------------------------------------------

EVERY, STEPS = 12, 26


def no_room_on_rank_1(rank, recipe):
    if rank == 1:  # a file may have so many bytes, the kernel says; Python ignores its signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def no_room_on_rank_0_for_the_list(rank, recipe):
    """Only rank 0 fails, and only after the others have written: its list cannot be made."""
    if rank == 0:

        def hook(event, arguments):
            if event == "open" and str(arguments[0]).endswith("sha256sums") and arguments[1] == "w":
                raise OSError(28, "No space left on device")

        sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (no_room_on_rank_1, ["File too large", "File too large"]),
        pytest.param(
            no_room_on_rank_0_for_the_list,
            ["No space left on device", "another rank could not write"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_rank_that_cannot_write_ends_all_before_the_next_checkpoint(tiny_dataset, tmp_path, plant, words):
    sections = {
        "optim": {"steps": STEPS},
        "checkpoint": {"every": EVERY, "asynchronous": True},
        "parallel": {"strategy": "fsdp"},
        "log": {"tensorboard": False, "plot": False, "every": STEPS},
        "guard": {"step_timeout": 60.0, "evaluation_timeout": 60.0},
    }
    recipe = write_recipe(tmp_path / "run.yaml", tiny_recipe(tiny_dataset, tmp_path / "run", **sections))
    codes, errors = run_ranks(recipe, plant)
    assert codes == [1, 1], errors
    for error, said in zip(errors, words, strict=True):
        assert error.startswith("error: ") and said in error and "Traceback" not in error, errors
        assert "start the same command again" in error or "the same command goes on" in error
    assert EVERY <= len(losses(tmp_path / "run")) < 2 * EVERY  # by the vote of a step
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    if plant is no_room_on_rank_0_for_the_list:  # the slow one
        assert run_ranks(recipe, nothing)[0] == [0, 0]
        assert len(losses(tmp_path / "run")) == STEPS
