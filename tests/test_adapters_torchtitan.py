"""Packs as torchtitan's dataloader, with its own model and loss. Its Trainer needs a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import hosts
import pytest
import torch
from hosts import KILLED_AT, NUM_STEPS

from omnidata.loader import PackLoader
from omnidata.schema import IGNORE_INDEX, UserError

pytest.importorskip("torchtitan")
SEQ_LEN, GLOBAL_BATCH = 96, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dataset without pictures."""
    return hosts.make(tmp_path_factory.mktemp("text"), pictures=False)[0]


@pytest.fixture
def uncompiled(monkeypatch):
    """torchtitan's attention without its compiler, which takes minutes."""
    from torch.nn.attention import flex_attention
    from torchtitan.models.common import attention

    monkeypatch.setattr(attention.FlexAttention, "_compiled_flex_attn", flex_attention.flex_attention)
    monkeypatch.setattr(attention, "_compiled_create_block_mask", flex_attention.create_block_mask)


def loader_of(path, *, rank=0, ranks=1, rows=1, tokenizer=None, **config):
    from omnidata.adapters.torchtitan import PackDataLoader

    made = PackDataLoader.Config(dataset_path=path, global_batch=GLOBAL_BATCH, num_epochs=9, **config)
    runtime = {"tokenizer": tokenizer, "snapshot_every_n_steps": 1}
    return made.build(dp_world_size=ranks, dp_rank=rank, seq_len=SEQ_LEN, local_batch_size=rows, **runtime)


class Job:
    """torchtitan's model and loss, as its Trainer uses them: sums over a step's valid tokens."""

    def __init__(self):
        from torchtitan.components.loss import CrossEntropyLoss
        from torchtitan.models.llama3 import model_registry

        torch.manual_seed(0)
        config = model_registry("debugmodel", attn_backend="flex").model
        self.model = config.build()
        self.model.init_weights(buffer_device=torch.device("cpu"))
        self.model.requires_grad_(False)  # its attention has no backward pass on a CPU: the head learns
        self.model.lm_head.requires_grad_(True)
        self.loss = CrossEntropyLoss.Config(global_vocab_size=2048).build()
        self.sgd = torch.optim.SGD(self.model.lm_head.parameters(), lr=0.05)

    def step(self, batches):
        valid = sum((labels != IGNORE_INDEX).sum() for _, labels in batches)
        total = 0.0
        for inputs, labels in batches:
            masks = self.model.get_attention_masks(positions=inputs["positions"])
            logits = self.model(inputs["input"], positions=inputs["positions"], attention_masks=masks)
            loss = self.loss(logits, labels, valid)[0]
            loss.backward()
            total += float(loss.detach())
        self.sgd.step()
        self.sgd.zero_grad()
        return total


def own_losses(path, steps):
    """The same model on PackLoader's microbatches, one by one and without padding."""
    loader = PackLoader(path, max_tokens=SEQ_LEN, global_batch=GLOBAL_BATCH, num_epochs=9)
    job, losses, batches = Job(), [], []
    for microbatch in loader:
        inputs = {"input": microbatch.input_ids[None], "positions": microbatch.position_ids[None]}
        if microbatch.position_ids.ndim == 2:
            inputs["positions"] = microbatch.position_ids[:1]
        batches.append((inputs, microbatch.labels[None]))
        if len(batches) == GLOBAL_BATCH:
            losses.append(job.step(batches))
            batches = []
            if len(losses) == steps:
                return losses
    raise AssertionError("too little data")


def train(job, loaders, steps):
    """Losses of some steps, all ranks' batches one after the other."""
    streams, losses = [iter(loader) for loader in loaders], []
    for _ in range(steps):
        count = loaders[0].loader.microbatches_per_step // loaders[0]._rows
        losses.append(job.step([next(stream) for stream in streams for _ in range(count)]))
    return losses


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_thirty_steps_resumed_from_four_ranks_on_two(text, tmp_path, uncompiled):
    import torch.distributed.checkpoint as dcp

    own, job = own_losses(text, NUM_STEPS), Job()
    four = [loader_of(text, rank=rank, ranks=4) for rank in range(4)]
    losses = train(job, four, KILLED_AT)
    assert len({json.dumps(loader.state_dict(), sort_keys=True) for loader in four}) == 1
    dcp.save({"model": job.model, "dataloader": four[0]}, checkpoint_id=tmp_path / "step-12", no_dist=True)
    job, two = Job(), [loader_of(text, rank=rank, ranks=2, rows=2) for rank in range(2)]
    for loader in two:
        states = {"model": job.model, "dataloader": loader}
        dcp.load(states, checkpoint_id=tmp_path / "step-12", no_dist=True)
    losses += train(job, two, NUM_STEPS - KILLED_AT)
    assert losses == pytest.approx(own, abs=2e-5)


def test_rows_are_padded_as_a_document_of_their_own(text):
    inputs, labels = next(iter(loader_of(text, rows=2)))
    assert inputs["input"].shape == inputs["positions"].shape == labels.shape == (2, SEQ_LEN)
    loader = iter(PackLoader(text, max_tokens=SEQ_LEN, global_batch=GLOBAL_BATCH, num_epochs=1))
    for row in range(2):
        microbatch = next(loader)
        size = microbatch.num_tokens
        assert torch.equal(inputs["input"][row, :size], microbatch.input_ids)
        assert torch.equal(labels[row, :size], microbatch.labels)
        assert (labels[row, size:] == IGNORE_INDEX).all()
        assert inputs["positions"][row, size:].tolist() == list(range(SEQ_LEN - size))


def test_pictures_and_uneven_batches_are_refused(text, tmp_path):
    with pytest.raises(UserError, match="global_batch 4 does not divide by 3 ranks of 1 rows"):
        loader_of(text, ranks=3)
    pictured = hosts.make(tmp_path, num_records=6)[0]
    with pytest.raises(UserError, match="has pictures, and torchtitan's decoders take text only"):
        loader_of(pictured)


def test_another_tokenizer_is_refused(text, mistral, tmp_path):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    def own(folder):
        return HuggingFaceTokenizer.Config().build(tokenizer_path=str(folder))

    loader_of(text, tokenizer=own(f"{text}/tokenizer"))
    mistral.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="torchtitan's tokenizer has 32"):
        loader_of(text, tokenizer=own(tmp_path))


def test_the_examples_job_builds_its_dataloader(text, monkeypatch):
    examples = Path(__file__).parents[1] / "examples"
    assert len((examples / "torchtitan_job.py").read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(examples)
    config = importlib.import_module("torchtitan_job").job(text, "run")
    runtime = {"dp_world_size": 4, "dp_rank": 3, "tokenizer": None, "snapshot_every_n_steps": 1}
    training = {"seq_len": config.training.seq_len, "local_batch_size": config.training.local_batch_size}
    loader = config.dataloader.build(**runtime, **training)
    assert loader.loader.microbatches_per_step == config.training.global_batch_size // 4
    inputs, _ = next(iter(loader))
    assert inputs["input"].shape == (1, config.training.seq_len)
