"""A stranger's model or tokenizer folder brings Python files: none is run, and nobody is asked whether to."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from tiny_dataset import write_tokenizer

from omnidata.schema import UserError
from omnidata.text.convert import converted
from omnidata.text.tokenizer import load_tokenizer
from omnimodel.weights import assemble

ROOT = Path(__file__).parent.parent
AUTO_MAP = {
    "AutoConfig": "foreign.Config",
    "AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"],
    "AutoModel": "foreign.Model",
    "AutoModelForCausalLM": "foreign.Model",
}
CODE = """
open({marker!r}, "w").close()
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
class Config(MistralConfig): model_type = "foreign"
class Tokenizer(PreTrainedTokenizerFast): pass
class Model(MistralForCausalLM): pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Any way in which transformers finds code beside a model; the test fails if any of it is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    folder, marker = tmp_path / "foreign", tmp_path / "ran"
    folder.mkdir()
    for name in ("foreign.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(marker)))
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": AUTO_MAP}))
    _write_tokenizer_config(folder, {})
    yield folder
    assert not marker.exists()


def _write_tokenizer_config(folder: Path, before: dict) -> None:
    config = before | {"tokenizer_class": "Tokenizer", "auto_map": AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_that_needs_code_of_its_own_is_refused_in_one_line(folder):
    with pytest.raises(
        UserError, match=r"foreign: no tokenizer\.json, and transformers converts nothing"
    ) as no:
        converted(folder)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("load", [load_tokenizer, converted])
def test_a_tokenizer_with_a_whole_file_is_loaded_without_its_code(folder, load):
    plain = folder.parent / "plain"
    write_tokenizer(plain)
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    _write_tokenizer_config(folder, json.loads((plain / "tokenizer_config.json").read_text()))
    text = "<|user|>\nHow many?"
    assert load(folder).encode(text) == load(plain).encode(text)


def test_a_language_model_that_needs_code_of_its_own_is_refused(folder, tmp_path):
    with pytest.raises((UserError, ValueError), match="foreign"):
        assemble(folder, "vit_tiny_patch16_224", tmp_path / "out")


def test_every_automatic_class_is_told_not_to_run_code():
    """What transformers is asked by name of a class cannot be foreign; what it picks by itself can."""
    calls = 0
    for top in ("omnidata", "omnimodel", "pipelines", "benchmarks"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert isinstance(node.value, ast.Constant) and node.value.value is False, file
                if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("from_pretrained"):
                    continue
                if ast.unparse(node.func).split(".")[-2:][0].startswith("Auto"):
                    calls += 1
                    assert "trust_remote_code" in [keyword.arg for keyword in node.keywords], file
    assert calls >= 2
