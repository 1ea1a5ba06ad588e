"""A dataset's packs in accelerate, PyTorch and Lightning: the losses of our own loop, resumed exactly."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import torch
from hosts import KILLED_AT, NUM_STEPS, SETTINGS

from omnidata.adapters.pytorch import PackDataset
from omnidata.adapters.stream import Stream, check_parallelism
from omnidata.loader import PackLoader
from omnidata.schema import UserError
from omnidata.shards import CorruptSampleError

EXAMPLES = Path(__file__).parents[1] / "examples"
OPTIONS = {"packs": SETTINGS, "lr": hosts.LR, "save_steps": KILLED_AT}
ENERGON = re.compile(r"step (\d+) loss ([\d.]+): (.*)")
PRINTED = re.compile(r"step (\d+) loss ([\d.]+)")
TOLERANCE = 1e-6  # of losses around 6.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dataset, model's folder)"""
    return hosts.make(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def own(made):
    """Losses of our own loop."""
    return hosts.own_losses(made[0], hosts.load_model(made[1]))


class KilledError(Exception):
    """Nobody catches it."""


def kill(monkeypatch, *, after):
    """The stream ends as a kill would: behind step ``after`` of this process."""
    iterate = Stream.__iter__

    def until_killed(self):
        for number, batch in enumerate(iterate(self), 1):
            if number > after * self.microbatches_per_step:
                raise KilledError
            yield batch

    monkeypatch.setattr(Stream, "__iter__", until_killed)


def example(name, monkeypatch):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name).main


def killed_and_resumed(name, made, place, monkeypatch, capsys, **options):
    """What the example printed: losses by step, of the killed run and of the one that goes on."""
    main = example(name, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill(patch, after=KILLED_AT + 1)
        main(*made, str(place), **OPTIONS, **options)
    first = PRINTED.findall(capsys.readouterr().out)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill(patch, after=NUM_STEPS - KILLED_AT)
        main(*made, str(place), "--resume", **OPTIONS, **options)
    second = PRINTED.findall(capsys.readouterr().out)
    assert [int(step) for step, _ in second] == list(range(KILLED_AT + 1, NUM_STEPS + 1))
    return [float(loss) for _, loss in first[:KILLED_AT] + second]


@pytest.mark.parametrize(
    ("name", "place"),
    [("pytorch_loop", "run.pt"), pytest.param("accelerate_loop", "run", marks=pytest.mark.slow)],
)
def test_loops_have_our_losses_and_go_on_after_a_kill(name, place, made, own, tmp_path, monkeypatch, capsys):
    found = killed_and_resumed(name, made, tmp_path / place, monkeypatch, capsys)
    assert found == pytest.approx(own, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:Checkpoint directory .* is not empty")
def test_lightning_has_our_losses_and_goes_on_after_a_kill(made, own, tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    main, losses = example("lightning_fit", monkeypatch), {}

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            losses.setdefault(number // 2, []).append(float(outputs["loss"]))

    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
    options = {**OPTIONS, **quiet, "accelerator": "cpu", "max_steps": NUM_STEPS, "callbacks": [Losses()]}
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill(patch, after=KILLED_AT + 1)
        main(*made, str(tmp_path), **options)
    assert len(losses) == KILLED_AT + 1
    del losses[KILLED_AT]
    main(*made, str(tmp_path), "--resume", **options)
    assert [sum(losses[step]) for step in range(NUM_STEPS)] == pytest.approx(own, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("data_parallel", "shared"), [(1, True), (2, False)])
def test_lightnings_tensor_parallel_ranks_share_their_packs(made, data_parallel, shared):
    pytest.importorskip("lightning")
    words = [Path(__file__).parent / "lightning_ranks.py", made[0], data_parallel, 2 // data_parallel]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(rows) for rows in re.findall(r"ROWS (\[.*?\])", done.stdout))
    assert len(first) > 1 and (first == second) is shared


def test_several_workers_of_a_dataloader_are_refused(made):
    loader = torch.utils.data.DataLoader(PackDataset(made[0], **SETTINGS), batch_size=None, num_workers=2)
    with pytest.raises(UserError, match="2 workers of a DataLoader would each yield every pack"):
        next(iter(loader))


def test_every_batch_calls_the_tower_for_ranks_wait_for_each_other(made):
    bare = {**SETTINGS, "rank": 1, "world_size": 2}
    pictures = [bool(microbatch.images) for microbatch in PackLoader(made[0], **bare)]
    assert True in pictures and False in pictures
    assert all("pixel_values" in batch for batch in PackDataset(made[0], **bare))
    left_out = PackDataset(made[0], dummy_picture=False, **bare)
    assert ["pixel_values" in batch for batch in left_out] == pictures


ONE_PICTURE = json.dumps([f"r{number}" for number in range(23) if number == 0 or number % 3])  # of 16 samples


@pytest.mark.parametrize("where", ["n_images == 0", f"id in {ONE_PICTURE}"])
def test_a_model_is_asked_about_documents_without_pictures(made, where):
    """The dummy's picture is none of theirs: it is neither inverted nor counted as a document."""
    data, model = {"path": made[0], "where": where}, hosts.load_model(made[1])
    batch = next(iter(PackDataset(data, model, **SETTINGS)))
    assert "pixel_values" in batch


def test_ranks_that_share_a_microbatch_are_refused():
    from accelerate import ParallelismConfig

    check_parallelism(ParallelismConfig(dp_shard_size=4))
    with pytest.raises(UserError, match=r"share a microbatch \(tp 2, cp 1, sp 1\)"):
        check_parallelism(ParallelismConfig(tp_size=2))


def test_another_accumulation_of_accelerates_is_refused(made):
    from accelerate import Accelerator

    from omnidata.adapters import accelerate as adapter

    with pytest.raises(UserError, match="gradient_accumulation_steps is 7, and a step of these packs has 2"):
        adapter.packs(made[0], Accelerator(cpu=True, gradient_accumulation_steps=7), **SETTINGS)


@pytest.mark.slow
def test_ranks_of_a_stream_share_the_plans_step(made):
    """Each rank's own batches, whose losses are averaged over ranks and microbatches: the step's loss."""
    model = hosts.load_model(made[1])
    settings = {**SETTINGS, "global_batch": 4}
    [whole, *_] = hosts.own_losses(made[0], model, steps=1, settings=settings)
    model = hosts.load_model(made[1])
    ranks = [PackLoader(made[0], rank=rank, world_size=2, **settings) for rank in range(2)]
    streams = [iter(Stream(loader, averaged_over=4)) for loader in ranks]
    shares = [float(model(**next(stream)).loss.detach()) for stream in streams for _ in range(2)]
    assert sum(shares) / 4 == pytest.approx(whole, abs=TOLERANCE)
    assert len(Stream(ranks[0])) == 2 * sum(ranks[0].steps_per_epoch(epoch) for epoch in range(3))


@pytest.mark.slow
def test_energon_has_the_losses_of_the_same_documents_alone_and_goes_on(made, tmp_path, monkeypatch, capsys):
    """Energon's own order, so the reference is each step's documents, one by one, by their keys."""
    pytest.importorskip("megatron.energon")
    main, file = example("energon_loop", monkeypatch), str(tmp_path / "run.pt")
    options = {"max_tokens": 96, "packs": 2, "lr": hosts.LR, "steps": NUM_STEPS, "save_steps": KILLED_AT}
    update, done = torch.optim.SGD.step, []

    def killed_later(self, *arguments):
        done.append(None)
        if len(done) == KILLED_AT + 2:
            raise KilledError
        return update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(torch.optim.SGD, "step", killed_later)
        main(*made, file, **options)
    first = ENERGON.findall(capsys.readouterr().out)
    main(*made, file, "--resume", **options)
    second = ENERGON.findall(capsys.readouterr().out)
    assert first[KILLED_AT] == second[0], "the step after the checkpoint is done again, the same"
    steps = first[:KILLED_AT] + second
    assert [int(step) for step, _, _ in steps] == list(range(1, NUM_STEPS + 1))
    packs = [ast.literal_eval(keys) for _, _, keys in steps]
    assert any(len(keys) > 1 for step in packs for keys in step)
    own = hosts.losses_alone(*made, [[key for keys in step for key in keys] for step in packs])
    assert [float(loss) for _, loss, _ in steps] == pytest.approx(own, abs=2e-6)


def test_energon_stops_at_what_it_cannot_use(made, tmp_path):
    from omnidata.adapters import energon

    with pytest.raises(UserError, match="a pack holds 20"):
        energon.PackTaskEncoder(made[0], max_tokens=20)
    with pytest.raises(CorruptSampleError, match="not an int32 vector"):
        raw = {"input_ids.npy": b"?", "labels.npy": b"?", "__key__": "0", "__restore_key__": ()}
        energon.cook(raw)
    assert energon.PackTaskEncoder.__default_failure_tolerance__ == 1
