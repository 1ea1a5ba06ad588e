"""RUN/final: a folder that from_pretrained loads, with the tokenizer of the data and a card that says whence.

    final/config.json  model.safetensors  tokenizer.json …  README.md  recipe.yaml

Adapters are merged into the weights. A bfloat16 run is saved in bfloat16. The folder appears under its name
when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from omnidata import Dataset
from omnidata.durable import Store
from omnidata.schema import TOKENIZER_DIR
from omnimodel import OmniLMMForCausalLM
from pipelines.config import DatasetConfig, Recipe, to_yaml
from pipelines.data import slicing_config
from pipelines.lora import merged
from pipelines.parallel import DTYPES, World


def export(
    model: OmniLMMForCausalLM,
    recipe: Recipe,
    datasets: Sequence[Dataset],
    world: World,
    *,
    step: int,
    best: tuple[float, int] | None,
) -> Path:
    """Write ``RUN/final``; a collective of all ranks, rank 0 writes."""
    folder = Path(recipe.run.dir) / "final"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if world.is_main:
        temporary = folder.with_name(".tmp-final")
        shutil.rmtree(temporary, ignore_errors=True)
        model.config.slicing = slicing_config(datasets)  # pictures of questions must be cut like these
        _save_model(model, merged(state, recipe.model.lora), temporary, dtype=DTYPES[recipe.run.dtype])
        _copy_tokenizer(datasets[0], temporary)
        (temporary / "recipe.yaml").write_text(to_yaml(recipe))
        (temporary / "README.md").write_text(card(recipe, datasets, step=step, best=best))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    world.barrier()
    return folder


def _save_model(
    model: OmniLMMForCausalLM, state: dict[str, torch.Tensor], folder: Path, *, dtype: torch.dtype
) -> None:
    """Through a clean copy: the trained one may be sharded, wrapped or full of adapters."""
    with torch.device("meta"):
        clean = OmniLMMForCausalLM(model.config)
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    clean.load_state_dict(tensors, assign=True)
    clean.config.dtype = dtype
    clean.generation_config.eos_token_id = model.config.end_token_ids  # where a reply ends, in any tool
    transformers.utils.logging.disable_progress_bar()
    clean.save_pretrained(folder)


def _copy_tokenizer(dataset: Dataset, folder: Path) -> None:
    """File by file: loading and saving a tokenizer can change it."""
    source = Path(Store(dataset.path).local_copy(TOKENIZER_DIR))
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _share(config: DatasetConfig) -> str:
    return f"{config.epochs or 1:g} epochs" if config.weight is None else f"weight {config.weight:g}"


def card(recipe: Recipe, datasets: Sequence[Dataset], *, step: int, best: tuple[float, int] | None) -> str:
    """The model card."""
    configs = [*recipe.data.train, *recipe.data.val]
    rows = [
        f"| {c.path} | {c.split} | {_share(c)} | {len(d):,} | `{d.digest}` |"
        for c, d in zip(configs, datasets, strict=True)
    ]
    validation = "No validation data."
    if best:
        validation = f"Lowest validation loss {best[0]:.4f}, after step {best[1]}"
        validation += "." if best[1] == step else f"; these weights are those of step {step}."
    return "\n".join(
        [
            f"# {Path(recipe.run.dir).name}",
            "",
            f"An OmniLMM vision-language model, trained for {step} steps. {validation}",
            "",
            "```python",
            "from omnimodel import OmniLMMForCausalLM",
            'model = OmniLMMForCausalLM.from_pretrained("this folder")',
            "```",
            "",
            "## Data",
            "",
            "| dataset | split | share | samples | digest |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Tokenizer fingerprint `{datasets[0].manifest.tokenizer_fingerprint}`.",
            f"A reply ends with one of the ids {datasets[0].manifest.end_of_turn}.",
            "",
            "## Recipe",
            "",
            "```yaml",
            to_yaml(recipe).rstrip(),
            "```",
            "",
        ]
    )
