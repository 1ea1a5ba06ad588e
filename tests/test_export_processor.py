"""What a run of any class leaves opens elsewhere, with transformers alone, and says the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_families
import torch
import transformers
from PIL import Image

from pipelines import export
from pipelines.config import parse_recipe
from pipelines.data import model_config, open_datasets
from pipelines.model import build_model
from pipelines.parallel import start

# Nothing of ours is imported: what a user does with the folder.
FRESH = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert not any(name.startswith(("omnimodel", "pipelines", "omnidata")) for name in sys.modules)
folder, picture, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))  # their number decides the order of sums
processor = AutoProcessor.from_pretrained(folder)
how = {"dtype": torch.float32, "attn_implementation": "sdpa"}
model = AutoModelForImageTextToText.from_pretrained(folder, **how).eval()
parts = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
with torch.no_grad():
    torch.save({"inputs": dict(inputs), "logits": model(**inputs).logits}, out)
"""
FAST = ("qwen3_vl", "gemma3")  # positions of three axes; renamed weights


def recipe_of(folder, out):
    return parse_recipe(
        {
            "run": {"dir": str(out), "device": "cpu", "threads": 1},
            "data": {"train": [{"path": str(folder / "data")}], "max_tokens": 512, "global_batch": 1},
            "model": {"path": str(folder / "model")},
            "optim": {"lr": 1e-3, "steps": 1},
        }
    )


@pytest.mark.parametrize(
    "name",
    [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in tiny_families.MODELS if n not in FAST)],
)
def test_a_fresh_process_gives_the_same_logits(family, tmp_path, name):
    folder = family(name)
    recipe, picture = recipe_of(folder, tmp_path / "run"), tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(picture)
    datasets = open_datasets(recipe.data.train)
    with start(recipe) as world, torch.no_grad():
        model = build_model(recipe, model_config(recipe.model, datasets[0]), world).model.eval()
        torch.manual_seed(16)
        for parameter in model.parameters():  # as training would: it is no longer what model.path holds
            parameter += 0.01 * torch.randn_like(parameter)
        export.export(model, recipe, datasets, world, step=1, best=None)
    words = [tmp_path / "run" / "final", picture, torch.get_num_threads(), tmp_path / "fresh.pt"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, words)], check=True, cwd=tmp_path)
    fresh = torch.load(tmp_path / "fresh.pt")
    plain = transformers.AutoModelForImageTextToText.from_config(
        model.config, dtype=torch.float32, attn_implementation="sdpa"
    )
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(**fresh["inputs"]).logits, fresh["logits"])
        # and the trained class itself, which computes some sums in another order
        torch.testing.assert_close(model(**fresh["inputs"]).logits, fresh["logits"], atol=2e-5, rtol=1e-4)
        before = transformers.AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
        assert not torch.allclose(before(**fresh["inputs"]).logits, fresh["logits"], atol=1e-3)
