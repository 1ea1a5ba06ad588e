"""RUN/final: a folder that from_pretrained loads, with the tokenizer of the data and a card that says whence.

    final/config.json  model.safetensors  tokenizer.json …  README.md  recipe.yaml
    and of any class but OmniLMM the processor's files, so that AutoProcessor opens the folder, too

Adapters are merged into the weights. A bfloat16 run is saved in bfloat16. The folder appears under its name
when it is whole. RUN/final-ema beside it holds the running mean of the weights, if optim.ema
kept one. Training writes them at its end; from any checkpoint of a run they are made by::

    python pipelines/export.py RUN                            # RUN/step-00000400 from the newest checkpoint
    python pipelines/export.py RUN --step best --out model    # the one with the lowest validation loss
    python pipelines/export.py RUN --step 200 --dtype bfloat16
    python pipelines/export.py RUN --ema                      # RUN/step-00000400-ema: their running mean
    python pipelines/export.py RUN --adapters                 # the adapters alone, as peft keeps them
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from omnidata import Dataset
from omnidata.durable import Store
from omnidata.schema import PROCESSOR_DIR, TOKENIZER_DIR, UserError
from omnimodel import OmniLMMForCausalLM
from omnimodel.packed import is_packed

from .card import card
from .checkpoint import RECIPE, TRAINER
from .checkpoint_reader import CheckpointReader
from .checksums import verify
from .config import ModelConfig, Recipe, load_recipe, to_yaml
from .data import model_config, open_datasets, slicing_config
from .lora import is_adapter, merged, peft_config
from .model import choose_trainable, load_model, new_model
from .parallel import DTYPES, World
from .prompts import PROFILE


def export(
    model: nn.Module,
    recipe: Recipe,
    datasets: Sequence[Dataset],
    world: World,
    *,
    step: int,
    best: tuple[float, int] | None,
    is_mean: bool = False,
) -> Path:
    """Write ``RUN/final``, or ``RUN/final-ema`` if the weights in place are the mean.

    A collective of all ranks, of which rank 0 writes.
    """
    folder = Path(recipe.run.dir) / ("final-ema" if is_mean else "final")
    # Adapters are merged in the dtype that they were trained in.
    dtype = None if recipe.model.lora else DTYPES[recipe.run.dtype]
    shards = cast("dict[str, torch.Tensor]", get_model_state_dict(model))
    state = gathered(shards, dtype, keep=world.is_main)
    if world.is_main:
        weights = merged(state, recipe.model.lora)
        text = card(recipe, datasets, step=step, best=best, is_mean=is_mean)
        write(model, weights, recipe, datasets, folder, dtype=recipe.run.dtype, text=text)
    world.barrier()
    return folder


def gathered(
    state: dict[str, torch.Tensor], dtype: torch.dtype | None, *, keep: bool
) -> dict[str, torch.Tensor]:
    """Whole tensors in host memory, on the rank that wants to ``keep`` them.

    Shards are cast before they are sent: one tensor at a time is whole in another dtype than it is saved in.
    """
    whole = {}
    for name, tensor in state.items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = tensor.cpu()
    return whole


def write(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    recipe: Recipe,
    datasets: Sequence[Dataset],
    folder: Path,
    *,
    dtype: str,
    text: str,
) -> None:
    """The folder of a model whose weights, adapters merged, are ``state``; ``text`` is its card."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if is_packed(model):
        _save_packed(model, state, datasets[0], temporary, dtype=DTYPES[dtype])
    else:
        model.config.slicing = slicing_config(datasets)  # pictures of questions must be cut like these
        _save_model(model, state, temporary, dtype=DTYPES[dtype])
        _copy_folder(datasets[0], TOKENIZER_DIR, temporary)
    (temporary / "recipe.yaml").write_text(to_yaml(recipe))
    (temporary / "README.md").write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


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


def _save_packed(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    dataset: Dataset,
    folder: Path,
    *,
    dtype: torch.dtype,
) -> None:
    """As the class's own ``save_pretrained`` does, and the processor beside it."""
    _copy_folder(dataset, PROCESSOR_DIR, folder)  # its config.json is the base model's, and written over
    (folder / PROFILE).write_text(json.dumps(dataset.manifest.profile, indent=1))  # arguments of its calls
    with torch.device("meta"):
        clean = model.original(type(model.config).from_dict(model.config.to_dict()))
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    clean.load_state_dict(tensors, assign=True)
    clean.tie_weights()
    for config in (clean.config, *(getattr(clean.config, name) for name in clean.config.sub_configs)):
        if config is not None:
            config.dtype = dtype
    clean.generation_config = copy.deepcopy(model.generation_config)
    clean.generation_config.eos_token_id = end_tokens(model, dataset)  # where a reply ends, in any tool
    clean.generation_config._from_model_config = False  # or a load would derive it anew
    transformers.utils.logging.disable_progress_bar()
    clean.save_pretrained(folder)


def end_tokens(model: PreTrainedModel, dataset: Dataset) -> list[int]:
    """Ids that end a reply: of the training data, and those that the model had."""
    had = model.generation_config.eos_token_id
    had = had if isinstance(had, list) else [] if had is None else [had]
    return list(dict.fromkeys([*dataset.manifest.end_of_turn, *had]))


def _copy_folder(dataset: Dataset, name: str, folder: Path) -> None:
    """File by file: loading and saving a tokenizer or processor can change it."""
    shutil.copytree(Path(Store(dataset.path).local_copy(name)), folder, dirs_exist_ok=True)


# --- from a checkpoint ------------------------------------------------------------------------------------


def find_checkpoint(run: Path, step: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint and what the trainer knew then; ``step``: best, last or a number.

    Raises:
        UserError: the run has no such checkpoint, or it is damaged.
    """
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    if not names:
        raise UserError(f"{run} has no checkpoint in {run / 'checkpoints'}")
    wanted = names[-1]
    if step == "best":
        best = json.loads((run / "checkpoints" / names[-1] / TRAINER).read_text())["best"]
        if best is None:
            raise UserError(f"{run} has no validation loss, so no step is the best: give last or a number")
        wanted = f"step-{best[1]:08d}"
    elif step != "last":
        if not step.isdigit():
            raise UserError(f"--step {step}: give best, last or the number of a step")
        wanted = f"step-{int(step):08d}"
    folder = run / "checkpoints" / wanted
    if wanted not in names:
        raise UserError(f"{run} has no checkpoint {wanted}; it has {', '.join(names)}")
    if problem := verify(folder):
        raise UserError(f"checkpoint {folder} is damaged: {problem}; give another --step")
    return folder, json.loads((folder / TRAINER).read_text())


def restore(folder: Path, recipe: Recipe, datasets: Sequence[Dataset], *, is_mean: bool) -> nn.Module:
    """The model of a checkpoint, in this process's memory, adapters apart; its mean instead if asked."""
    config = model_config(recipe.model, datasets[0])
    # What was frozen is not in the checkpoint, but in model.path.
    model = new_model(config) if recipe.model.path is None else load_model(recipe.model, config)
    choose_trainable(model, recipe)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    reader = CheckpointReader(folder)
    held = reader.read_metadata().state_dict_metadata
    # So are parameters that take no part in the loss, which training froze when it had asked the model.
    trained = {name for name in trained if f"model.{name}" in held}
    if recipe.model.path is not None:
        state = {name: tensor for name, tensor in state.items() if name in trained}
    wanted = {"model": state}
    if is_mean:  # of what was trained; the rest has no mean
        wanted["ema"] = {name: p.detach() for name, p in model.named_parameters() if name in trained}
        shared = {tensor.data_ptr() for tensor in wanted["ema"].values()}
        wanted["model"] = {name: x for name, x in state.items() if x.data_ptr() not in shared}
    if is_mean and not any(name.startswith("ema.") for name in held):
        raise UserError(f"checkpoint {folder} has no running mean of the weights: its run had no optim.ema")
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return model


def export_adapters(model: nn.Module, settings: ModelConfig, folder: Path) -> None:
    """The adapters alone, in peft's own layout."""
    if settings.lora is None:
        raise UserError("the run has no adapters (model.lora)")
    others = [n for n, p in model.named_parameters() if p.requires_grad and not is_adapter(n)]
    if others:
        raise UserError(
            f"the run also trained {len(others)} other weights ({others[0]}, …), which adapters alone do not "
            "hold: export without --adapters"
        )
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if is_adapter(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapters = peft_config(model, settings.lora)
    adapters.base_model_name_or_path = settings.path
    adapters.save_pretrained(str(folder))


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--step", default="last", metavar="best|last|N", help="which checkpoint")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; the run's without it")
    parser.add_argument("--ema", action="store_true", help="the running mean of the weights (optim.ema)")
    parser.add_argument("--adapters", action="store_true", help="only the adapters, as peft keeps them")
    parser.add_argument("--out", metavar="DIR", help="RUN/step-N, RUN/step-N-ema without it")
    options = parser.parse_args(arguments)
    try:
        run = Path(options.run)
        checkpoint, trainer = find_checkpoint(run, options.step)
        recipe = load_recipe(str(checkpoint / RECIPE), [f"run.dir={run}"])
        datasets = open_datasets([*recipe.data.train, *recipe.data.val])
        model = restore(checkpoint, recipe, datasets, is_mean=options.ema)
        folder = Path(options.out or run / (checkpoint.name + "-ema" * options.ema))
        if options.adapters:
            export_adapters(model, recipe.model, folder)
        else:
            state = merged(model.state_dict(), recipe.model.lora)
            dtype = options.dtype or recipe.run.dtype
            best = tuple(trainer["best"]) if trainer["best"] else None
            text = card(recipe, datasets, step=trainer["step"], best=best, is_mean=options.ema)
            write(model, state, recipe, datasets, folder, dtype=dtype, text=text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"step {trainer['step']} of {run} written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
