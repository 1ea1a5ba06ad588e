"""Packs in Hugging Face's Trainer and TRL's SFTTrainer: the losses of our own loop, resumed exactly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import hosts
import pytest
import torch
import torch.nn.functional as F
from hosts import KILLED_AT, NUM_STEPS, SETTINGS
from transformers import AttentionInterface, AutoProcessor, Trainer, TrainingArguments

from omnidata.adapters import hf
from omnidata.adapters.microbatches import Microbatches
from omnidata.loader import PackLoader
from omnidata.schema import UserError

TOLERANCE = 2e-6  # of losses around 6.5: float32 rounding; averaged means would differ by 1e-4 here
COMMON = {
    **{"optim": "sgd", "learning_rate": hosts.LR, "lr_scheduler_type": "constant", "max_grad_norm": 0},
    **{"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
    **{"bf16": False, "activation_checkpointing": False},
}
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dataset, model's folder)"""
    return hosts.make(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def own(made):
    """Losses of our own loop."""
    data, folder = made
    return hosts.own_losses(data, hosts.load_model(folder))


class KilledError(Exception):
    """Nobody catches it."""


def kill(self, args, state, control, **kwargs):
    """Ends a run as a kill would, in the step after its last checkpoint."""
    if state.global_step > KILLED_AT:
        raise KilledError


def trainer_of(made, run, *, settings=SETTINGS, **more):
    data_path, folder = made
    model = hosts.load_model(folder)
    data = hf.train_dataset(data_path, model, **settings)
    args = TrainingArguments(str(run), **(data.arguments() | COMMON | {"max_steps": NUM_STEPS} | more))
    return Trainer(model, args, train_dataset=data, data_collator=data.collator, callbacks=[data.callback])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- the numbers of microbatches ----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_numbers_are_dealt_as_the_plan_deals(made, world_size):
    settings = {**SETTINGS, "global_batch": 4}
    loaders = [
        PackLoader(made[0], rank=rank, world_size=world_size, **settings) for rank in range(world_size)
    ]
    numbers = Microbatches(loaders[0])
    streams = [list(loader) for loader in loaders]
    assert len(numbers) == sum(map(len, streams))
    for number in (*range(len(numbers)), 5, 2, len(numbers) - 1):
        mine, its = numbers[number], streams[number % world_size][number // world_size]
        assert (mine.keys, mine.step, mine.epoch) == (its.keys, its.step, its.epoch)
        assert mine.num_supervised_tokens == its.num_supervised_tokens
        assert torch.equal(mine.labels, its.labels)
    assert {mine.epoch for mine in streams[0]} == {0, 1, 2}
    with pytest.raises(IndexError):
        numbers[len(numbers)]


def test_the_state_of_a_step_is_the_loaders(made):
    loader = PackLoader(made[0], **SETTINGS)
    numbers, steps = Microbatches(PackLoader(made[0], **SETTINGS)), 0
    assert numbers.state_dict(0) == loader.state_dict()
    for number, _ in enumerate(loader, 1):
        if number % loader.microbatches_per_step == 0:
            steps += 1
            assert numbers.state_dict(steps) == loader.state_dict()
    assert steps == numbers.num_steps


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_trainer", pytest.param("trl_sft", marks=pytest.mark.slow)])
def test_losses_are_those_of_our_own_loop_and_a_killed_run_goes_on(name, made, own, tmp_path, monkeypatch):
    """The example scripts themselves, 30 steps, killed behind the checkpoint at step 12."""
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(EXAMPLES)
    run = partial(__import__(name).main, *made, str(tmp_path))
    options = {"packs": SETTINGS, **COMMON, "max_steps": NUM_STEPS, "save_steps": KILLED_AT}
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(hf.PackCallback, "on_step_begin", kill)
        run(**options)
    state = json.loads((tmp_path / f"checkpoint-{KILLED_AT}" / "trainer_state.json").read_text())
    loader = PackLoader(made[0], **SETTINGS)
    loader.load_state_dict(state["stateful_callbacks"]["omnidata"])
    assert loader.state_dict()["step"] == KILLED_AT
    again = run("--resume", **options, dataloader_num_workers=1)
    assert losses(again) == pytest.approx(own, abs=TOLERANCE)
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_a_loss_function_for_models_that_take_no_number(made, own, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(made[1])
    data = hf.train_dataset(made[0], tokenizer, **SETTINGS)
    model = hosts.load_model(made[1])
    arguments = {**data.arguments(), **COMMON, "max_steps": 4, "save_strategy": "no"}

    def make(**more):
        args = TrainingArguments(str(tmp_path), **arguments)
        common = {"train_dataset": data, "data_collator": data.collator, "callbacks": [data.callback]}
        return Trainer(model, args, **common, **more)

    with pytest.raises(UserError, match="averages the means"):
        make().train()
    trainer = make(compute_loss_func=data.loss)
    trainer.train()
    assert losses(trainer) == pytest.approx(own[:4], abs=TOLERANCE)


# --- what is refused ----------------------------------------------------------------------------------------


def test_settings_that_would_change_what_is_learned_are_refused_together(made, tmp_path):
    wrong = {"per_device_train_batch_size": 4, "train_sampling_strategy": "random", "num_train_epochs": 2}
    wrong |= {"label_smoothing_factor": 0.1}
    config = {"dispatch_batches": True}
    trainer = trainer_of(made, tmp_path, **wrong, accelerator_config=config)
    with pytest.raises(UserError) as caught:
        trainer.train()
    for name in wrong:
        assert re.search(rf"\n  {name}( is |: )", str(caught.value))
    assert "accelerator_config.dispatch_batches: " in str(caught.value)


def test_another_datasets_checkpoint_is_refused(made, tmp_path):
    trainer = trainer_of(made, tmp_path, save_steps=2, max_steps=2)
    trainer.train()
    other = trainer_of(made, tmp_path, settings=SETTINGS | {"seed": 4}, max_steps=4)
    with pytest.raises(UserError, match="state is of another plan"):
        other.train(resume_from_checkpoint=True)


def blind(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention that knows of no documents."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def test_a_model_whose_documents_see_each_other_is_refused(made):
    AttentionInterface.register("blind", blind)
    model = hosts.load_model(made[1])
    model.set_attn_implementation({"text_config": "blind"})
    with pytest.raises(UserError, match="documents of a pack see each other: changing one moves"):
        hf.train_dataset(made[0], model, **SETTINGS)


def test_a_document_that_is_another_in_a_pack_is_refused(made, monkeypatch):
    """None sees another, but the second one's positions are others than when it is alone."""
    from omnidata.adapters import isolation

    given = isolation.model_inputs

    def shifted(pack, **options):
        inputs = given(pack, **options)
        documents = torch.bucketize(torch.arange(pack.num_tokens), pack.cu_seqlens[1:], right=True)
        inputs["position_ids"] = inputs["position_ids"].clone()
        inputs["position_ids"][1:] *= 1 + 50 * documents
        return inputs

    monkeypatch.setattr(isolation, "model_inputs", shifted)
    with pytest.raises(UserError, match="a document's loss in a pack differs by"):
        hf.train_dataset(made[0], hosts.load_model(made[1]), **SETTINGS)


def test_a_model_is_asked_if_packs_of_one_document_come_first(made):
    settings = SETTINGS | {"max_tokens": 72, "global_batch": 1}
    data = hf.train_dataset(made[0], hosts.load_model(made[1]), **settings)
    assert len(data.microbatches[0].keys) == 1


def test_another_tokenizer_or_too_few_embeddings_are_refused(made, mistral):
    with pytest.raises(UserError, match="was built with another tokenizer"):
        hf.train_dataset(made[0], mistral, **SETTINGS)
    model = hosts.load_model(made[1])
    model.resize_token_embeddings(100)
    with pytest.raises(UserError, match="has embeddings for 100 tokens"):
        hf.train_dataset(made[0], model, **SETTINGS)


@pytest.mark.slow
def test_four_ranks_then_two_are_one(made, tmp_path):
    """Three steps with 4 ranks, then three more with 2: the losses of one process, some without pictures."""
    settings = SETTINGS | hosts.FOUR_RANKS
    ranks = [islice(PackLoader(made[0], rank=rank, world_size=4, **settings), 3) for rank in range(4)]
    assert any(len({bool(one.images) for one in step}) == 2 for step in zip(*ranks, strict=True))
    own = hosts.own_losses(made[0], hosts.load_model(made[1]), steps=6, settings=settings)
    for ranks, steps in ((4, 3), (2, 6)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(Path(__file__).parent / "hf_ranks.py"), *made, str(tmp_path), str(steps)]
        output = run_to_its_end(command, seconds=400)
    [line] = [line for line in output.splitlines() if line.startswith("LOSSES ")]
    assert json.loads(line.removeprefix("LOSSES ")) == pytest.approx(own, abs=1e-5)


def run_to_its_end(command, *, seconds):
    """What it printed; ranks that wait for each other are stopped, and the test says so."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        _, errors = process.communicate(timeout=60)
        pytest.fail(
            f"no end after {seconds} s: does a rank without pictures call the tower?\n{errors[-3000:]}"
        )
    assert process.returncode == 0, errors[-3000:]
    return output
