"""What only a GPU can prove of a run's start, of its host tensors and of its running mean."""

import pytest
import torch
from tiny_recipe import MODEL, losses, tiny_recipe, write_recipe

from omnidata.loader.loader import PackLoader
from omnimodel import OmniLMMConfig
from pipelines.config import load_recipe, parse_recipe
from pipelines.data import model_inputs
from pipelines.export import main as export
from pipelines.model import build_model, new_model
from pipelines.parallel import start
from pipelines.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_tensor_of_a_microbatch_is_page_locked_and_its_copy_does_not_wait(tiny_dataset):
    microbatch = next(iter(PackLoader(tiny_dataset, global_batch=1, max_tokens=400, pin_memory=True)))
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "images", "image_positions"):
        assert getattr(microbatch, name).is_pinned(), name
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = model_inputs(microbatch, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(inputs["input_ids"][0].cpu(), microbatch.input_ids)


def test_random_weights_are_drawn_there_with_the_buffers_of_a_cpu(tiny_dataset, tmp_path):
    recipe = parse_recipe(tiny_recipe(tiny_dataset, tmp_path, run={"device": "cuda"}))
    config = OmniLMMConfig(**MODEL, vocab_size=99)
    with start(recipe) as world:
        one, other = (build_model(recipe, config, world).model for _ in range(2))
    assert {p.device.type for p in one.parameters()} == {"cuda"}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    expected = dict(new_model(config).named_buffers())
    assert all(torch.equal(x.cpu(), expected[name]) for name, x in one.named_buffers())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_running_mean_is_kept_evaluated_resumed_and_exported(tiny_dataset, tmp_path, dtype):
    source = str(tiny_dataset)
    tree = tiny_recipe(
        tiny_dataset,
        tmp_path / "run",
        run={"device": "cuda", "dtype": dtype},
        data={"train": [{"path": source}], "val": [{"path": source, "split": "val"}]},
        optim={"ema": 0.9},
        eval={"every": 2, "num_batches": 2, "num_questions": 2},
    )
    recipe = write_recipe(tmp_path / "run.yaml", tree)
    train(load_recipe(recipe, ["run.stop_after=3"]))
    train(load_recipe(recipe))
    assert len(losses(tmp_path / "run")) == 6
    assert "val_loss_ema" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "final-ema" / "model.safetensors").exists()
    assert export([str(tmp_path / "run"), "--ema", "--out", str(tmp_path / "mean")]) == 0
