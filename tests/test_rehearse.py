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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from omnidata.loader.microbatch import Microbatch
from omnimodel import OmniLMMConfig, attention
from omnimodel.host_known import HostKnown
from omnimodel.loss import summed_loss
from omnimodel.modeling import OmniLMMModel
from omnimodel.packed import class_for, config_of
from omnimodel.resampler import Resampler
from pipelines import kernel_limits, mixer_kernels, rehearsal
from pipelines.config import parse_recipe
from pipelines.data import model_inputs
from pipelines.kernel_limits import Call, Widths, refusals
from pipelines.model import build_model
from pipelines.optim import build_optimizer
from pipelines.packs import packs_of
from pipelines.parallel import World, start
from pipelines.playback import FLOPS, Playback
from pipelines.rehearsal import play, pretended_world, rehearse, step

CONFIG = MODEL | {"vocab_size": 128, "num_query": 4, "im_patch_token": 125}
CONFIG |= {"im_start_token": 126, "im_end_token": 127}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")  # DDP's


def recipe(path=None, *, device="auto", dtype="bfloat16", tokens=220, strategy="fsdp", **model):
    sections = {"run": {"dtype": dtype, "device": device}}
    sections["parallel"] = {"strategy": "single" if dtype == "float32" else strategy}
    tree = tiny_recipe("nowhere", "unused", **sections)
    tree["data"] = {"train": [{"path": "nowhere"}], "max_tokens": tokens, "global_batch": 4}
    tree["model"] = ({"path": str(path)} if path else {"config": dict(CONFIG)}) | model
    return parse_recipe(tree)


def config_for(path=None, **changes):
    return config_of(str(path)) if path else OmniLMMConfig(**CONFIG | changes)


def rehearsed(strategy="fsdp", **changes):
    ours, config = recipe(strategy=strategy), config_for(**changes)
    return rehearse(ours, config, packs_of(ours, config, []), gpus=2)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_sound_step_has_neither_waits_nor_refusals_and_does_not_hang(strategy):
    report = rehearsed(strategy)
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


def test_ranks_with_more_rows_to_learn_meet_no_more_often_in_the_head(family, monkeypatch):
    """A head of its own weight (InternVL's here) is gathered once, however many chunks its rows make."""
    monkeypatch.setitem(summed_loss.__kwdefaults__, "chunk_rows", 16)
    folder = family("internvl") / "model"
    ours, config = recipe(folder, tokens=300), config_for(folder)
    config.tie_word_embeddings = False
    packs = packs_of(ours, config, [])
    chunks = [-(-pack.num_supervised_tokens // 16) for pack in (packs.full, packs.text_only)]
    assert chunks[0] < chunks[1]
    assert rehearse(ours, config, packs, gpus=2)["hangs"] is None


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_rank_that_skips_the_tower_is_found(monkeypatch, strategy):
    embed = OmniLMMModel.embed

    def skipping(self, input_ids, pixel_values=None, **kwargs):
        if pixel_values is None:
            return self.embed_tokens(input_ids)
        return embed(self, input_ids, pixel_values, **kwargs)

    monkeypatch.setattr(OmniLMMModel, "embed", skipping)
    assert "text only" in rehearsed(strategy)["hangs"]


def call(width, *, dtype=torch.bfloat16, **more):
    tensor = torch.empty(4, 2, width, dtype=dtype)
    return Call(tensor, tensor, **more)


def test_what_a_kernel_does_not_take_is_refused():
    """By the table of constraints; EVA02-E's width of 112 ran on an H200."""
    assert not [width for width in (64, 80, 96, 112, 128, 192, 256) if list(refusals(call(width)))]
    for refused in (call(12), call(100), call(264), call(512)):
        assert f"head width of {refused.width}: variable-length" in next(refusals(refused))
    [card] = refusals(call(208, gpu="rtx4090", is_backward=True))
    assert "head width of 208" in card and not list(refusals(call(208, gpu="h100", is_backward=True)))
    [problem] = refusals(call(64, dtype=torch.float32))
    assert "float16 and bfloat16" in problem
    grouped = Call(torch.empty(4, 4, 64, dtype=torch.bfloat16), torch.empty(4, 2, 64, dtype=torch.bfloat16))
    assert len(list(refusals(grouped))) == (not attention.KERNEL_GROUPS_HEADS)
    apart = Call(*[torch.empty(4, 64, 2, dtype=torch.bfloat16).transpose(1, 2)] * 2)
    assert "contiguous" in next(refusals(apart))


def test_a_head_width_that_the_kernel_refuses_is_named(monkeypatch):
    planted = rehearsed(head_dim=12)["refusals"]
    assert any("head width of 12" in line and "attention.py" in line for line in planted)
    assert rehearsed(head_dim=112)["refusals"] == {}
    # As FlexAttention was in torch 2.5.
    powers = Widths("a kernel", "powers of two", lambda width: width.bit_count() == 1)
    monkeypatch.setattr(kernel_limits, "WIDTHS", [powers])
    planted = rehearsed(head_dim=112)["refusals"]
    assert any("head width of 112: a kernel takes powers of two" in line for line in planted)


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


def test_ddp_of_a_class_reads_nothing_from_the_gpu(family):
    """Of parameters that are not used DDP's C++ keeps a list, on the host."""
    folder = family("qwen3_vl") / "model"
    ours, config = recipe(folder, tokens=700, strategy="ddp"), config_for(folder)
    with pretended_world(ours, 2) as world:
        playback = play(ours, config, [packs_of(ours, config, []).full], world)
    assert not [place for place in playback.waits if not place.startswith("pipelines/optim.py")]
    assert [name for name, _ in playback.collectives].count("allreduce_") >= 2


def test_gated_delta_nets_are_played_as_their_kernels(family):
    """Whether this machine has them or not; fla reads the bounds of a pack once."""
    folder = family("minicpmv4_6") / "model"
    ours, config = recipe(folder, tokens=700), config_for(folder)
    report = rehearse(ours, config, packs_of(ours, config, []), gpus=2)
    assert report["assumed"] == [mixer_kernels.ASSUMED] and report["hangs"] is None
    assert report["waits"] == {mixer_kernels.WAITS_IN: 2}  # microbatches


def test_a_gated_delta_net_keeps_what_its_kernel_keeps():
    tokens, heads, groups, width = 640, 4, 2, 32
    with FakeTensorMode():
        q, k = (torch.empty(1, tokens, groups, width, dtype=torch.bfloat16) for _ in range(2))
        v = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16, requires_grad=True)
        g, beta = torch.empty(1, tokens, heads), torch.empty(1, tokens, heads, dtype=torch.bfloat16)
        saved = mixer_kernels._Chunks.apply(q, k, v, g, beta, 10).grad_fn.saved_tensors
    rows = 2 * groups * (2 * width + 4) + heads * (2 * width + 4 + 2 + 2 * 64)  # bytes of a token
    assert sum(x.numel() * x.element_size() for x in saved) == tokens * rows


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
    there = bytes_of(recorded)
    # Weights that were read from a file lie in its pages, not in the allocator's memory.
    peak = max(there) - there[-1] + sum(storage.nbytes() for storage in held())
    with FlopCounterMode(display=False, custom_mapping=RAW) as counter:
        once(1)
    return peak, counter.get_total_flops()


def of_two(run, *arguments):
    """What ``run(rank, port, queue, *arguments)`` of two processes put into the queue."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    queue = CONTEXT.Queue()
    given = (port, queue, *arguments)
    processes = [CONTEXT.Process(target=run, args=(rank, *given), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    return results


def as_rank(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


# Some buckets of DDP's, which are 25 MB but for the first.
LARGE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 5}


def of_ranks(path, strategy):
    """(recipe, configuration, a pack of it)."""
    large = {} if path else LARGE
    model = {} if path else {"config": CONFIG | large}
    ours, config = recipe(path, device="cpu", strategy=strategy, **model), config_for(path, **large)
    return ours, config, packs_of(ours, config, []).full


def bytes_of(recorded):
    """What torch's CPU allocator had given out after each event."""
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return list(accumulate(sizes))


def real_rank(rank, port, queue, path, strategy):
    """One of two real ranks, watched as in a rehearsal: collectives, and the allocator's fullest moment."""
    as_rank(rank, port)
    ours, config, full = of_ranks(path, strategy)
    playback = Playback()
    with start(ours) as world:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            once, _ = real_step(ours, config, full, world, playback)
            once(1)
            once(2)
        with playback:
            playback.restart()
            once(2)
    queue.put((playback.collectives, max(bytes_of(recorded))))


def uneven_rank(rank, port, queue, path):
    """One of two real ranks whose packs have other numbers of rows to learn, 16 of them a chunk."""
    as_rank(rank, port)
    summed_loss.__kwdefaults__["chunk_rows"] = 16
    ours, config = recipe(device="cpu"), config_for(path)
    config.tie_word_embeddings = False
    packs = packs_of(recipe(path, tokens=300), config, [])
    with start(ours) as world:
        once, _ = real_step(ours, config, (packs.full, packs.text_only)[rank], world, Playback())
        once(1)
    queue.put(rank)


@pytest.mark.slow
def test_real_ranks_with_other_numbers_of_chunks_do_not_hang(family):
    assert sorted(of_two(uneven_rank, family("internvl") / "model")) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", ["omnilmm", "qwen3_vl", "internvl", "smolvlm"])
def test_collectives_are_those_of_two_real_ranks(family, name, strategy):
    path = None if name == "omnilmm" else family(name) / "model"
    real = of_two(real_rank, path, strategy)
    ours, config, full = of_ranks(path, strategy)
    with pretended_world(ours, 2) as world:
        playback = play(ours, config, [full] * 2, world)
    (first, peak), (second, _) = real
    assert playback.collectives == first == second and len(first) >= (2 if strategy == "ddp" else 10)
    if name == "omnilmm":  # weights of the others lie in their files' pages, not in the allocator's memory
        assert sum(playback.peak.values()) == pytest.approx(peak, rel=0.03)
