"""The planner's figures: against a real run of the same model, torch's own FLOP counter, and the recipes."""

import math
import re
from dataclasses import replace
from pathlib import Path

import published
import pytest
import torch
from ranks import CONTEXT
from tiny_dataset import build_tiny_dataset
from tiny_recipe import tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from omnidata.schema import UserError
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from omnimodel.packed import config_of
from pipelines import memory
from pipelines.config import load_recipe, parse_recipe
from pipelines.data import model_inputs
from pipelines.flops import count_flops
from pipelines.measure import Calibration, measure
from pipelines.memory import check_fits
from pipelines.model import choose_trainable, new_model
from pipelines.packs import omnilmm_pack, packs_of
from pipelines.parallel import World
from pipelines.plan_memory import estimate_line, plan
from pipelines.planning import open_for_planning
from pipelines.rehearsal import peak_of, rehearse
from pipelines.train import train

CONFIG = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 3, "embed_dim": 128, "num_heads": 4, "patch_size": 8, "img_size": 64},
    "image_size": 64,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "num_query": 16,
    "im_patch_token": 3997,
    "im_start_token": 3998,
    "im_end_token": 3999,
}


def recipe(**model):
    return parse_recipe(
        {
            "run": {"dir": "unused", "device": "cpu", "threads": 1},
            "data": {"train": [{"path": "nowhere"}], "max_tokens": 2048, "max_images": 8, "global_batch": 1},
            "model": {"config": CONFIG, **model},
            "optim": {"steps": 1},
        }
    )


def test_calibration_follows_a_fixed_part_and_a_rate_and_bounds_noise():
    rate, fixed, update = 2e9, 0.5, 0.1
    points = [(flops, fixed + flops / rate) for flops in (1e9, 4e9)]
    machine = Calibration.of(points, update=update)
    assert machine.microbatch(8e9) == pytest.approx(fixed + 8e9 / rate)
    assert machine.step(8e9, microbatches=3) == pytest.approx(3 * (fixed + 8e9 / rate) + update)
    # The larger microbatch was no slower than the small one: only a busy machine says so.
    noisy = Calibration.of([(1e9, 3.0), (4e9, 3.0)], update=0.0)
    assert 3.0 < noisy.microbatch(8e9) < 6.0 and noisy.fixed <= 1.5 + 1e-9


def measure_there(queue):
    # Heads not grouped: torch 2.11 repeats keys and values on GPUs, for which the plan is, and not on CPUs.
    heads = {"num_key_value_heads": CONFIG["num_attention_heads"]}
    config = OmniLMMConfig(**CONFIG | heads)
    queue.put(measure(recipe(config=CONFIG | heads), config, []))


@pytest.mark.slow
def test_memory_is_within_15_percent_of_what_the_process_took():
    """In a process of its own: the peak of this one is somebody else's."""
    queue = CONTEXT.Queue()
    process = CONTEXT.Process(target=measure_there, args=(queue,))
    process.start()
    figures = queue.get(timeout=300)
    process.join()
    assert figures["predicted_memory_gb"] == pytest.approx(figures["measured_memory_gb"], rel=0.15), figures
    # benchmarks/memory.py compares the times, too: here others may be at work on the machine.


def played(ours):
    """The peak of a rehearsed step of 2,048 tokens, by kind; of two layers."""
    config = OmniLMMConfig(**CONFIG | {"num_hidden_layers": 2})
    return peak_of(ours, config, packs_of(ours, config, []), gpus=1)


def test_checkpointing_freezing_and_a_running_mean_show():
    kept = {
        mode: played(recipe(activation_checkpointing=mode))["activations"] for mode in ("none", "selective")
    }
    frozen = recipe(freeze=["vision_tower"], activation_checkpointing="full")
    less = played(replace(frozen, optim=replace(frozen.optim, ema=0.999)))
    assert less["activations"] < kept["selective"] < kept["none"]
    assert less["average"] == pytest.approx(less["optimizer"] / 2, rel=0.01)


@pytest.mark.parametrize("freeze", [[], ["vision_tower"], ["vision_tower", "language_model"]])
def test_flops_against_torch_counting_every_operation(freeze):
    """Ours count causal attention once; torch counts the whole square, so documents are short here."""
    torch.manual_seed(0)
    ours, real = recipe(freeze=freeze), OmniLMMForCausalLM(OmniLMMConfig(**CONFIG))
    choose_trainable(real, ours)
    pack = omnilmm_pack(real.config, tokens=512, images=2, documents=4, supervised=100)
    with FlopCounterMode(display=False) as counter:
        real(**model_inputs(pack, torch.device("cpu"))).loss.backward()
    assert count_flops(real).microbatch(pack) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_what_cannot_fit_is_refused_before_it_is_tried():
    huge = CONFIG | {"intermediate_size": 10**8}  # five terabytes of weights, gradients and moments
    world = World(0, 1, torch.device("cpu"), "single")
    with pytest.raises(UserError, match="would not fit"):
        check_fits(recipe(), OmniLMMConfig(**huge), world)


def test_a_step_is_rehearsed_only_when_asked(tmp_path, capsys):
    """And before any process group is there; what cannot fit ends the run with what would help."""
    data = build_tiny_dataset(tmp_path / "data")
    tree = tiny_recipe(data, tmp_path / "run", optim={"steps": 1, "warmup_steps": 0})
    train(parse_recipe(tree))
    assert "activations more" in capsys.readouterr().out
    tree |= {"guard": {"plan_memory": True}, "run": tree["run"] | {"dir": str(tmp_path / "planned")}}
    train(parse_recipe(tree))
    assert "memory: about 0.0 GB" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"rehearse\.py"):
        memory._judged("about", 2e12, 1e12, "")


def test_tiles_see_themselves_alone(family):
    """InternVL's and SmolVLM's pictures are tiles of the tower's size, Qwen's are one row of patches each."""
    for name, is_tiled in (("internvl", True), ("smolvlm", True), ("qwen3_vl", False)):
        config = config_of(str(family(name) / "model"))
        with torch.device("meta"):
            model = new_model(config)
        count = count_flops(model)
        if not is_tiled:
            assert math.isinf(count.patches_of_tile), name
            continue
        one = count.patches_of_tile * count.values_per_patch
        tile, four = (count.of([], images=1, supervised=0, pixel_values=n * one) for n in (1, 4))
        assert four == pytest.approx(4 * tile), name


def test_a_configuration_that_a_dataset_keeps_needs_it():
    with pytest.raises(UserError, match="build it first"):
        open_for_planning(load_recipe(RECIPES / "tiny_processor_cpu.yaml"))


RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"
GIGABYTES = re.compile(r"([\d.]+) GB")


def check_estimates(path, *overrides):
    """The lines of a recipe's head are what the planner prints; a GB more or less with another torch."""
    stated = re.findall(r"^# (estimate: .*)$", path.read_text(), re.MULTILINE)
    gpus = [int(line.split()[1]) for line in stated]
    assert 8 in gpus
    planned = [estimate_line(figures) for figures in plan(load_recipe(path, overrides), gpus=gpus)]
    assert [GIGABYTES.sub("", line) for line in stated] == [GIGABYTES.sub("", line) for line in planned]
    for line, plan_line in zip(stated, planned, strict=True):
        assert abs(float(GIGABYTES.search(line)[1]) - float(GIGABYTES.search(plan_line)[1])) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["align", "sft", "full", "lora"])
def test_recipes_state_the_planners_estimates(name):
    check_estimates(RECIPES / f"{name}.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(published.MODELS))
def test_recipes_of_other_classes_state_the_planners_estimates(name, tmp_path):
    folder = published.save(name, tmp_path / "model")
    check_estimates(RECIPES / f"{name}.yaml", f"model.path={folder}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "full", "lora"])
def test_a_plan_is_its_rehearsal(name):
    """Of two layers: the same peak, less what no rehearsal shows."""
    small = ["model.path=null", "model.config={vision_kwargs: {depth: 2}, num_hidden_layers: 2}"]
    ours = load_recipe(RECIPES / f"{name}.yaml", small)
    [figures] = plan(ours, gpus=[8])
    config, datasets, _ = open_for_planning(ours)
    report = rehearse(ours, config, packs_of(ours, config, datasets), gpus=8)
    assert figures["memory_gb"] - figures["memory"]["overhead"] / 1e9 == pytest.approx(
        report["memory_gb"], rel=0.05
    )
    assert figures["step_seconds"] == pytest.approx(report["step_seconds"], rel=0.05)
