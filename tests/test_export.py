"""A model folder from any checkpoint of a run: last, best, by number, in another dtype, adapters alone."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import ROOT, tiny_recipe, write_recipe
from torch.distributed.tensor import DTensor

from pipelines import export
from pipelines.checkpoint import TRAINER
from pipelines.config import load_recipe
from pipelines.data import model_config, open_datasets
from pipelines.model import build_model
from pipelines.parallel import start
from pipelines.train import train


def run_of(dataset, folder, **sections):
    sections = {"checkpoint": {"every": 2, "keep_last": 9}, "eval": {"every": 2}} | sections
    tree = tiny_recipe(dataset, folder, **sections)
    tree["data"]["val"] = [{"path": str(dataset), "split": "val"}]
    train(load_recipe(write_recipe(folder.with_suffix(".yaml"), tree)))
    return folder


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    return run_of(tiny_dataset, tmp_path_factory.mktemp("export") / "run")


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_checkpoint_is_the_run_s_final_folder(run, tmp_path):
    assert export.main([str(run), "--out", str(tmp_path / "last")]) == 0
    assert same(weights(tmp_path / "last"), weights(run / "final"))
    assert {path.name for path in (tmp_path / "last").iterdir()} == {
        path.name for path in (run / "final").iterdir()
    }


def test_any_step_and_the_best_one(run, tmp_path):
    assert export.main([str(run), "--step", "2"]) == 0
    assert not same(weights(run / "step-00000002"), weights(run / "final"))
    trainer = json.loads((run / "checkpoints" / "step-00000006" / TRAINER).read_text())
    best = trainer["best"][1]
    assert export.main([str(run), "--step", "best", "--out", str(tmp_path / "best")]) == 0
    assert export.main([str(run), "--step", str(best), "--out", str(tmp_path / "n")]) == 0
    assert same(weights(tmp_path / "best"), weights(tmp_path / "n"))
    card = (run / "step-00000002" / "README.md").read_text()
    assert "trained for 2 steps" in card and "after step" in card


def test_another_dtype_and_what_is_not_there(run, tmp_path, capsys):
    assert export.main([str(run), "--dtype", "bfloat16", "--out", str(tmp_path / "half")]) == 0
    assert all(
        x.dtype == torch.bfloat16 for x in weights(tmp_path / "half").values() if x.is_floating_point()
    )
    for options, words in {
        ("--step", "7"): "it has step-00000002, ",
        ("--step", "x"): "give best, last",
        ("--adapters",): "has no adapters",
    }.items():
        assert export.main([str(run), *options, "--out", str(tmp_path / "no")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_folder_opens_in_transformers_as_the_card_says(run):
    card = (run / "final" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this folder", str(run / "final"))
    code += "print(type(model).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "OmniLMMForCausalLM"


def test_adapters_alone_are_what_peft_opens(run, tiny_dataset, tmp_path):
    peft = pytest.importorskip("peft")
    from omnimodel import OmniLMMForCausalLM

    lora = {
        "path": str(run / "final"),
        "lora": {"rank": 2, "targets": ["language_model"]},
        "freeze": ["vision_tower", "resampler", "embeddings", "lm_head"],
    }
    tuned = run_of(tiny_dataset, tmp_path / "tuned", model=lora)
    assert export.main([str(tuned), "--adapters", "--out", str(tmp_path / "adapters")]) == 0
    base = OmniLMMForCausalLM.from_pretrained(run / "final").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
        merged = OmniLMMForCausalLM.from_pretrained(tuned / "final").eval()
        torch.testing.assert_close(
            opened(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )
        assert not torch.allclose(before, merged(input_ids=ids).logits, atol=1e-4)


def test_shards_are_cast_before_they_are_gathered(tiny_dataset, tmp_path, monkeypatch):
    """A 12B's weights would else stand in host memory in float32 and in bfloat16 at once."""
    gathered = []
    whole = DTensor.full_tensor

    def full_tensor(self, **options):
        gathered.append(self.dtype)
        return whole(self, **options)

    tree = tiny_recipe(tiny_dataset, tmp_path / "run", run={"dtype": "bfloat16"})
    recipe = load_recipe(write_recipe(tmp_path / "run.yaml", tree))
    datasets = open_datasets(recipe.data.train)
    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    with start(recipe) as world:
        built = build_model(recipe, model_config(recipe.model, datasets[0]), world)
        export.export(built.model, recipe, datasets, world, step=0, best=None)
    assert set(gathered) == {torch.bfloat16} and len(gathered) > 50
    assert {x.dtype for x in weights(tmp_path / "run" / "final").values()} == {torch.bfloat16}
