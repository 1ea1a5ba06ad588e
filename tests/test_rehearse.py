"""A rehearsed step against real ones, and planted faults: each is found and named."""

import functools
import os
import socket
from collections import Counter
from itertools import accumulate

import pytest
import torch
import transformers
from ranks import CONTEXT
from tiny_recipe import MODEL, tiny_recipe
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from omnidata.loader.microbatch import Microbatch
from omnimodel import OmniLMMConfig
from omnimodel.host_known import HostKnown
from omnimodel.modeling import OmniLMMModel
from omnimodel.packed import class_for, config_of
from omnimodel.resampler import Resampler
from pipelines import rehearsal
from pipelines.config import parse_recipe
from pipelines.data import model_inputs
from pipelines.model import build_model
from pipelines.optim import build_optimizer
from pipelines.packs import packs_of
from pipelines.parallel import World, start
from pipelines.playback import FLOPS, Playback, refusals
from pipelines.rehearsal import play, pretended_world, rehearse, step

CONFIG = MODEL | {"vocab_size": 128, "num_query": 4, "im_patch_token": 125}
CONFIG |= {"im_start_token": 126, "im_end_token": 127}
CPU = torch.device("cpu")


def recipe(path=None, *, device="auto", dtype="bfloat16", tokens=220, **model):
    sections = {"run": {"dtype": dtype, "device": device}}
    sections["parallel"] = {"strategy": "single" if dtype == "float32" else "fsdp"}
    tree = tiny_recipe("nowhere", "unused", **sections)
    tree["data"] = {"train": [{"path": "nowhere"}], "max_tokens": tokens, "global_batch": 4}
    tree["model"] = ({"path": str(path)} if path else {"config": dict(CONFIG)}) | model
    return parse_recipe(tree)


def config_for(path=None, **changes):
    return config_of(str(path)) if path else OmniLMMConfig(**CONFIG | changes)


def rehearsed(**changes):
    config = config_for(**changes)
    return rehearse(recipe(), config, packs_of(recipe(), config, []), gpus=2)


def test_a_sound_step_has_neither_waits_nor_refusals_and_does_not_hang():
    report = rehearsed()
    assert (report["waits"], report["refusals"], report["hangs"]) == ({}, {}, None)
    assert list(report["waits_on_purpose"].values()) == [1]  # the norm of the gradients
    assert report["memory"]["parameters"] > 0 and report["memory"]["optimizer"] > 0
    parts = {"vision_tower", "language_model", "lm_head", "resampler"}
    assert parts <= {part for part, flops in report["flops"].items() if flops}
    assert {f"{kind} of microbatch {n}" for kind in ("forward", "backward") for n in (1, 2)} <= set(
        report["peaks_gb"]
    )


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
    planted = rehearsed(head_dim=12)["refusals"]
    assert any("head width of 12" in line and "attention.py" in line for line in planted)


# --- other classes ----------------------------------------------------------------------------------------


def test_the_waits_of_a_class_are_those_that_a_gpu_showed(family, monkeypatch):
    """Of Qwen3-VL as it comes, pictures' grids on the device, one H200 named these lines in each forward:
    "72 at modeling_qwen3_vl.py:304" (24 blocks), "8 in vision_utils.py (64, 109, 112, 276-280)", "6 at
    847-848" (3 layers that take features), "1 at 1038". Here 3 blocks and 2 such layers.
    """
    folder = family("qwen3_vl") / "model"
    ours, config = recipe(folder, tokens=700), config_for(folder)

    def as_it_comes(model):
        model.get_encoder(modality="image").config._attn_implementation_internal = "sdpa"

    def unknown(microbatch, device):
        inputs = model_inputs(microbatch, device)
        known = {name: x.values for name, x in inputs.items() if isinstance(x, HostKnown)}
        return inputs | {name: x.to(device, non_blocking=True) for name, x in known.items()}

    monkeypatch.setattr(rehearsal, "model_inputs", unknown)
    with pretended_world(ours, 2) as world:
        full = packs_of(ours, config, []).full
        playback = play(ours, config, [full], world, prepare=as_it_comes)
    found = Counter()
    for place, number in playback.waits.items():
        file, _, line = place.rpartition("/")[2].partition(":")
        found[file, line] += number
    if transformers.__version__.startswith("5.24."):
        of_model = {line: n for (file, line), n in found.items() if file == "modeling_qwen3_vl.py"}
        assert {line: of_model[line] for line in ("304", "847", "848", "1038")} == {
            **{"304": 3 * 3, "847": 2, "848": 2, "1038": 1}
        }
        of_grids = {line: n for (file, line), n in found.items() if file == "vision_utils.py"}
        assert of_grids == {**{"64": 1, "109": 1, "112": 2}, **dict.fromkeys(("276", "277", "278", "280"), 1)}
    assert sum(found.values()) >= 18


def test_a_wait_planted_in_a_class_is_named_and_the_step_goes_on(family, monkeypatch):
    folder = family("internvl") / "model"
    ours, config = recipe(folder, tokens=300), config_for(folder)
    with torch.device("meta"):
        kind = type(class_for(config)._from_config(config).get_decoder().layers[0].mlp)
    forward = kind.forward

    def waiting(self, x):
        assert float(x.detach().abs().amax()) > 0
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", waiting)
    with pretended_world(ours, 2) as world:
        playback = play(ours, config, [packs_of(ours, config, []).full], world)
    line = waiting.__code__.co_firstlineno + 1
    assert playback.waits[f"tests/test_rehearse.py:{line}"] == 2  # layers


# --- against real steps -----------------------------------------------------------------------------------


def real_step(ours, config, microbatch: Microbatch, world, playback):
    """The rehearsal's step, with memory and numbers; the second of two, as the moments are there."""
    built = build_model(ours, config, world)
    optimizer = build_optimizer(built.model, ours.optim)

    def feed():
        return model_inputs(microbatch, world.device)

    def once(number):
        step(ours, world, built.model, built.wrapped, optimizer, [feed] * number, playback)

    def held():
        moments = [x for state in optimizer.state.values() for x in state.values()]
        return {x.untyped_storage() for x in (*built.model.parameters(), *built.model.buffers(), *moments)}

    return once, held


@pytest.mark.parametrize(
    "name",
    ["omnilmm", "qwen3_vl"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("internvl", "smolvlm", "pixtral")],
)
def test_memory_and_flops_are_those_of_a_real_step(family, name):
    """Peak within 3 % of what torch's allocator counted, FLOPs equal to torch's own counter's."""
    folder = None if name == "omnilmm" else family(name) / "model"
    ours, config = recipe(folder, device="cpu", dtype="float32", tokens=900), config_for(folder)
    packs, world = packs_of(ours, config, []), World(0, 1, CPU, "single")
    playback = play(ours, config, [packs.full], world)
    peak, flops = counted(ours, config, packs.full, world)
    assert sum(playback.peak.values()) == pytest.approx(peak, rel=0.03)
    assert sum(playback.flops.values()) == flops


def raw(formula):
    """As FlopCounterMode wants a formula that takes tensors, not shapes."""
    wrapped = functools.partial(formula)
    wrapped._get_raw = True
    return wrapped


RAW = {op: raw(formula) for op, formula in FLOPS.items()}


def counted(ours, config, microbatch, world):
    """(bytes of torch's CPU allocator at its fullest, FLOPs) of one real step with moments."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        once, held = real_step(ours, config, microbatch, world, Playback())
        once(1)
        once(1)
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    there = list(accumulate(sizes))
    # Weights that were read from a file lie in its pages, not in the allocator's memory.
    peak = max(there) - there[-1] + sum(storage.nbytes() for storage in held())
    with FlopCounterMode(display=False, custom_mapping=RAW) as counter:
        once(1)
    return peak, counter.get_total_flops()


def real_rank(rank, port, queue, path):
    """One of two real ranks, watched as in a rehearsal."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ours, config, playback = recipe(path, device="cpu"), config_for(path), Playback()
    with start(ours) as world:
        once, _ = real_step(ours, config, packs_of(ours, config, []).full, world, playback)
        once(1)
        with playback:
            playback.restart()
            once(2)
    queue.put(playback.collectives)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["omnilmm", "qwen3_vl", "internvl", "smolvlm"])
def test_collectives_are_those_of_two_real_ranks(family, name):
    path = None if name == "omnilmm" else family(name) / "model"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=real_rank, args=(rank, port, queue, path)) for rank in range(2)]
    for process in processes:
        process.start()
    real = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    ours, config = recipe(path, device="cpu"), config_for(path)
    with pretended_world(ours, 2) as world:
        played = play(ours, config, [packs_of(ours, config, []).full] * 2, world).collectives
    assert played == real[0] == real[1] and len(played) > 10
