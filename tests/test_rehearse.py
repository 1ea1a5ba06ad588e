"""A rehearsed step against real ones, and planted faults: each is found and named."""

import os
import socket

import pytest
import torch
from ranks import CONTEXT
from tiny_recipe import MODEL, tiny_recipe

from omnimodel import OmniLMMConfig
from omnimodel.modeling import OmniLMMModel
from omnimodel.resampler import Resampler
from pipelines.config import parse_recipe
from pipelines.measure import random_inputs
from pipelines.memory import Shape
from pipelines.model import build_model
from pipelines.optim import build_optimizer
from pipelines.parallel import start
from pipelines.playback import Playback, refusals
from pipelines.rehearse import play, pretended_world, rehearse, step

SHAPE = Shape(num_tokens=192, num_images=2, num_documents=3, num_supervised=40)
CONFIG = MODEL | {"vocab_size": 128, "num_query": 4, "im_patch_token": 125}
CONFIG |= {"im_start_token": 126, "im_end_token": 127}


def recipe(**model):
    tree = tiny_recipe("nowhere", "unused", run={"dtype": "bfloat16"}, parallel={"strategy": "fsdp"})
    tree["model"] = {"config": dict(CONFIG), **model}
    return parse_recipe(tree)


def rehearsed(**changes):
    return rehearse(recipe(), OmniLMMConfig(**CONFIG | changes), SHAPE, gpus=2)


def test_a_sound_step_has_neither_waits_nor_refusals_and_does_not_hang():
    report = rehearsed()
    assert (report["waits"], report["refusals"], report["hangs"]) == ({}, {}, None)
    assert list(report["waits_on_purpose"].values()) == [1]  # the norm of the gradients
    assert report["memory"]["parameters"] > 0 and report["memory"]["optimizer"] > 0
    assert {"vision_tower", "layers", "lm_head", "resampler"} <= {k for k, n in report["flops"].items() if n}


def test_a_planted_wait_is_named_with_its_line(monkeypatch):
    forward = Resampler.forward

    def waiting(self, x, *args, **kwargs):
        assert x.sum().item() is not None
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Resampler, "forward", waiting)
    line = waiting.__code__.co_firstlineno + 1
    assert rehearsed()["waits"] == {f"tests/test_rehearse.py:{line}": 2}  # microbatches


def test_a_rank_that_skips_the_tower_is_found(monkeypatch):
    embed = OmniLMMModel.embed

    def skipping(self, input_ids, pixel_values=None, **kwargs):
        if pixel_values is None:
            return self.embed_tokens(input_ids)
        return embed(self, input_ids, pixel_values, **kwargs)

    monkeypatch.setattr(OmniLMMModel, "embed", skipping)
    assert "text only" in rehearsed()["hangs"]


def test_a_head_width_that_no_kernel_takes_is_named():
    narrow, wide = torch.empty(4, 2, 12, dtype=torch.bfloat16), torch.empty(4, 2, 64)
    assert "head width of 12" in refusals(narrow, narrow)[0]
    assert "float16 and bfloat16" in refusals(wide, wide)[0]


def real_rank(rank, port, queue):
    """One of two real ranks, watched as in a rehearsal."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ours, config, playback = recipe(), OmniLMMConfig(**CONFIG), Playback()
    with start(ours) as world:
        built = build_model(ours, config, world)
        optimizer = build_optimizer(built.model, ours.optim)
        inputs = random_inputs(config, SHAPE, world.device)
        step(ours, built.model, built.wrapped, optimizer, [inputs], playback)
        with playback:
            step(ours, built.model, built.wrapped, optimizer, [inputs] * 2, playback)
    queue.put(playback.collectives)


@pytest.mark.slow
def test_collectives_are_those_of_two_real_ranks():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=real_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    real = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    with pretended_world(recipe(), 2) as world:
        ours = play(recipe(), OmniLMMConfig(**CONFIG), SHAPE, world).collectives
    assert ours == real[0] == real[1] and len(ours) > 10
