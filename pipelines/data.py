"""Datasets for a recipe: opened, checked against each other and the model, and fed to a device.

recipe.data ──open_datasets──▶ Dataset … ──mismatches──▶ one message, before any model work
Microbatch (CPU) ──model_inputs──▶ keyword arguments of the model's forward
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from omnidata import Dataset
from omnidata.images.slices import Slicing, slicing_of
from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch
from omnidata.schema import IGNORE_INDEX, IM_END, IM_PATCH, IM_START, Manifest, UserError
from omnidata.text.tokenizer import fingerprint, load_tokenizer
from omnimodel import OmniLMMConfig
from omnimodel.attention import takes_gpu_path
from omnimodel.host_known import known

from .config import DataConfig, DatasetConfig, ModelConfig, OptimConfig, Recipe
from .parallel import World, to_device
from .processor_model import processor_config, processor_mismatches

IMAGE_TOKEN_FIELDS = {"im_patch_token": IM_PATCH, "im_start_token": IM_START, "im_end_token": IM_END}
SENTENCE_TOKEN_FIELDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}


def open_datasets(configs: Sequence[DatasetConfig]) -> list[Dataset]:
    """Open each; one UserError for all that are missing or unfinished."""
    datasets, problems = [], []
    for config in configs:
        try:
            datasets.append(Dataset(config.path, config.split))
        except UserError as error:
            problems.append(str(error))
    kinds = {dataset.path: _profile_name(dataset.manifest) for dataset in datasets}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{path}: {kind}" for path, kind in kinds.items())
        problems.append(
            f"the datasets were built for different models ({found}): build them with one --model"
        )
    if problems:
        raise UserError("\n  ".join(dict.fromkeys(problems)))
    return datasets


def _profile_name(manifest: Manifest) -> str:
    return "OmniLMM" if manifest.is_omnilmm else manifest.profile["processor"]


def model_config(settings: ModelConfig, dataset: Dataset) -> Any:
    """The configuration of the model to train: OmniLMM's, or that of the class whose processor built it.

    An OmniLMM with random weights takes from the dataset what its recipe leaves open: the vocabulary, the ids
    of the special tokens and num_query.
    """
    manifest = dataset.manifest
    if not manifest.is_omnilmm:
        return processor_config(settings, dataset)
    from_data: dict[str, Any] = {"end_of_turn": manifest.end_of_turn}
    image_fit = {"image_fit": manifest.settings.get("image_fit", "squash")}
    if settings.path is not None:
        if not (Path(settings.path) / "config.json").exists():
            raise UserError(
                f"model.path {settings.path} is no model folder: it has no config.json. Earlier stages "
                "write RUN/final; `python -m omnimodel.weights assemble` makes the first one"
            )
        # A model that was trained with a fit keeps it, and a dataset of another one is refused.
        says = json.loads((Path(settings.path) / "config.json").read_text(encoding="utf-8"))
        from_data |= {} if "image_fit" in says else image_fit
        return OmniLMMConfig.from_pretrained(settings.path, **from_data)
    ids = manifest.special_tokens
    from_data |= image_fit | {field: ids[name] for field, name in IMAGE_TOKEN_FIELDS.items()}
    from_data |= {
        field: ids[name] for field, name in SENTENCE_TOKEN_FIELDS.items() if ids.get(name) is not None
    }
    from_data |= {"vocab_size": manifest.vocab_size, "num_query": manifest.num_query}
    return OmniLMMConfig(**(from_data | (settings.config or {})))


def refuse_mismatches(recipe: Recipe, datasets: Sequence[Dataset], config: PreTrainedConfig) -> None:
    """UserError that lists everything in which datasets, model and recipe do not fit."""
    problems = [line for dataset in datasets for line in _other_tokenizer(dataset)]
    if datasets[0].manifest.is_omnilmm:
        problems += _omnilmm_mismatches(recipe.model, datasets, config)
    else:
        problems += processor_mismatches(recipe.model, datasets, config)
    problems += _missing_packages(recipe)
    if problems:
        raise UserError(
            "the recipe, its datasets and its model do not fit:\n  "
            + "\n  ".join(dict.fromkeys(problems))
            + "\nBuild the dataset with the model's tokenizer and num_query (or its --model), or train "
            "another model on it."
        )


def _other_tokenizer(dataset: Dataset) -> Iterator[str]:
    name, manifest = dataset.path, dataset.manifest
    measured = fingerprint(load_tokenizer(dataset.tokenizer_dir))
    if measured != manifest.tokenizer_fingerprint:
        yield (
            f"{name}: its tokenizer folder now tokenizes differently ({measured[:12]}) from when the dataset "
            f"was built ({manifest.tokenizer_fingerprint[:12]}); this transformers may load it differently"
        )


def _omnilmm_mismatches(
    settings: ModelConfig, datasets: Sequence[Dataset], config: OmniLMMConfig
) -> Iterator[str]:
    for dataset in datasets:
        yield from _dataset_mismatches(dataset, datasets[0], config)
    yield from _slicing_mismatches(datasets, config)
    if settings.path is not None:
        yield from _tokenizer_mismatches(settings.path, datasets[0])
    if settings.config is not None:
        unknown = set(settings.config) - set(OmniLMMConfig().to_dict())
        yield from (f"model.config.{key}: OmniLMMConfig has no such field" for key in sorted(unknown))


def _dataset_mismatches(dataset: Dataset, first: Dataset, config: OmniLMMConfig) -> Iterator[str]:
    name, manifest = dataset.path, dataset.manifest
    for field in ("tokenizer_fingerprint", "chat_template_fingerprint"):
        mine, other = getattr(manifest, field), getattr(first.manifest, field)
        if mine != other:
            yield f"{name}: {field} {mine[:12]}, but {first.path} has {other[:12]}"
    fit = manifest.settings.get("image_fit", "squash")
    if fit != config.image_fit:
        yield f"{name}: built with --image-fit {fit}, but the model's image_fit is {config.image_fit}"
    if manifest.end_of_turn != first.manifest.end_of_turn:
        other = first.manifest.end_of_turn
        yield f"{name}: turns end with {manifest.end_of_turn}, but in {first.path} with {other}"
    if manifest.num_query != config.num_query:
        yield f"{name}: num_query {manifest.num_query}, but the model has {config.num_query}"
    if manifest.vocab_size > config.vocab_size:
        yield f"{name}: vocabulary {manifest.vocab_size}, but the model's is {config.vocab_size}"
    for field, token in IMAGE_TOKEN_FIELDS.items():
        if manifest.special_tokens.get(token) != getattr(config, field):
            yield (
                f"{name}: {token} is {manifest.special_tokens.get(token)}, but the model's {field} is "
                f"{getattr(config, field)}"
            )
    if manifest.image_policy == "shrink" and manifest.image_size < config.image_size:
        yield (
            f"{name}: images were shrunk to {manifest.image_size} pixels, but the model's image_size is "
            f"{config.image_size}"
        )


def data_slicing(datasets: Sequence[Dataset]) -> Slicing | None:
    """How the datasets' pictures were cut. Those without pictures go with any; the others must agree."""
    cuts = {
        dataset.path: slicing_of(dataset.manifest.settings)
        for dataset in datasets
        if dataset.manifest.num_images
    }
    if len(set(cuts.values())) > 1:
        found = ", ".join(f"{path}: {cut and cut.to_json()}" for path, cut in cuts.items())
        raise UserError(f"the datasets cut their pictures in different ways ({found}); build them alike")
    return next(iter(cuts.values()), None)


def slicing_config(datasets: Sequence[Dataset]) -> dict[str, Any] | None:
    """The same as the model's configuration carries it: with the ids of the tokens around the tiles."""
    slicing = data_slicing(datasets)
    if slicing is None:
        return None
    [ids, *_] = [d.manifest.special_tokens for d in datasets if d.manifest.num_images]
    return slicing.to_json() | {"slice_token_ids": [ids[token] for token in slicing.slice_tokens]}


def _slicing_mismatches(datasets: Sequence[Dataset], config: OmniLMMConfig) -> Iterator[str]:
    try:
        slicing = data_slicing(datasets)
    except UserError as error:
        yield str(error)
        return
    if slicing and slicing.slice_size < config.image_size:
        yield (
            f"tiles were cut at {slicing.slice_size} pixels (--slice-size), but the model's image_size is "
            f"{config.image_size}"
        )


def _tokenizer_mismatches(model_path: str, dataset: Dataset) -> list[str]:
    """A model folder that carries a tokenizer must carry the dataset's."""
    if not (Path(model_path) / "tokenizer_config.json").exists():
        return []
    mine, other = fingerprint(load_tokenizer(model_path)), dataset.manifest.tokenizer_fingerprint
    return (
        [] if mine == other else [f"{model_path}: tokenizer {mine[:12]}, but {dataset.path} has {other[:12]}"]
    )


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    """What the recipe asks for and this installation does not have."""
    wanted: dict[str, str] = {"log.tracker": recipe.log.tracker} if recipe.log.tracker != "none" else {}
    wanted |= {"model.lora": "peft"} if recipe.model.lora else {}
    for key, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            yield f"{key} needs {package}: pip install 'omnilmm-toolkit[{package}]'"


def new_token_ids(manifest: Manifest) -> list[int]:
    """Ids of the tokens that the toolkit added: image and grounding tokens."""
    known = set(SENTENCE_TOKEN_FIELDS.values()) | {"unk"}
    return sorted({token for name, token in manifest.special_tokens.items() if name not in known})


def refuse_empty_epochs(data: DataConfig, loader: PackLoader) -> None:
    """UserError for an epoch without a single step."""
    packs, batch = loader.plan.totals.num_packs, data.global_batch
    if packs == 0 or (data.tail == "drop" and packs < batch):
        raise UserError(
            f"an epoch has {packs} packs of up to {data.max_tokens} tokens and a step takes {batch}: "
            f"with data.tail {data.tail} there is no step to train. Lower data.global_batch to "
            f"{max(1, packs)} or less, lower data.max_tokens, or set data.tail=pad"
        )


def refuse_short_schedule(optim: OptimConfig, total_steps: int) -> None:
    """UserError for a schedule that does not fit into the run's steps, however those were given."""
    if optim.warmup_steps >= total_steps and optim.warmup_steps:
        raise UserError(
            f"optim.warmup_steps is {optim.warmup_steps} and the run has {total_steps} steps: the peak would "
            "never be reached"
        )
    if optim.schedule == "wsd" and optim.decay_steps > total_steps - optim.warmup_steps:
        raise UserError(
            f"optim.decay_steps is {optim.decay_steps}, but after {optim.warmup_steps} warmup_steps only "
            f"{total_steps - optim.warmup_steps} steps are left"
        )


def tail_of_epoch(data: DataConfig, world: World, num_packs: int) -> Iterator[str]:
    """What becomes of the packs that are too few for a step, and of ranks that are too many; in numbers."""
    batch = data.global_batch
    left = num_packs % batch
    if left and data.tail == "pad":
        yield f"the last step of an epoch has {left} of {batch} packs; its loss is over their tokens"
    elif left:
        yield f"data.tail drop leaves out {left} of {num_packs} packs in every epoch"
    if world.size > batch:
        yield f"{world.size} ranks for {batch} packs per step: {world.size - batch} ranks have no pack"


# --- loading ----------------------------------------------------------------------------------------------


def train_loader(recipe: Recipe, world: World, config: PreTrainedConfig) -> PackLoader:
    """Microbatches of this rank, for as many epochs as the recipe asks."""
    return PackLoader(
        [asdict(config) for config in recipe.data.train],
        num_epochs=recipe.optim.epochs,
        num_workers=recipe.data.num_workers,
        worker_timeout=recipe.data.worker_timeout,
        tail=recipe.data.tail,
        augment=recipe.data.augment,
        **_shared_settings(recipe, world, config),
    )


def val_loader(recipe: Recipe, world: World, config: PreTrainedConfig) -> PackLoader:
    """One pass over the validation data, the same at every evaluation."""
    return PackLoader(
        [asdict(config) for config in recipe.data.val],
        num_epochs=1,
        tail="pad",
        **_shared_settings(recipe, world, config),
    )


def _shared_settings(recipe: Recipe, world: World, config: PreTrainedConfig) -> dict[str, Any]:
    is_omnilmm = isinstance(config, OmniLMMConfig)
    return {
        "global_batch": recipe.data.global_batch,
        "max_tokens": recipe.data.max_tokens,
        "max_images": recipe.data.max_images,
        "oversize": recipe.data.oversize,
        "on_error": recipe.data.on_error,
        "checksum": recipe.data.checksum,
        "remote": recipe.data.remote,
        "seed": recipe.run.seed,
        "group_by": recipe.log.by,
        "rank": world.rank,
        "world_size": world.size,
        "image_size": config.image_size if is_omnilmm else None,
        "dummy_picture": not is_omnilmm,  # OmniLMM sees to that itself
        # A quarter of the bytes to send; on a CPU nothing is sent, and workers had better normalise.
        "raw_pixels": None if takes_gpu_path(world.device) else False,
        "pin_memory": world.device.type == "cuda",
    }


def model_inputs(microbatch: Microbatch, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model's forward; the copies to a GPU do not wait."""
    images = microbatch.images
    is_omnilmm = not isinstance(images, dict)
    there = to_device if is_omnilmm else to_device_and_known
    inputs = {
        "input_ids": there(microbatch.input_ids[None], device),
        "position_ids": there(microbatch.position_ids.unsqueeze(-2), device),  # [1, T] or [4, 1, T]
        "shift_labels": to_device(microbatch.labels, device)[None],
        "cu_seqlens": there(microbatch.cu_seqlens, device),
        "max_seqlen": microbatch.max_seqlen,
        "num_supervised_tokens": microbatch.num_supervised_tokens,
        "num_supervised_rows": num_supervised(microbatch),
    }
    if not isinstance(images, dict):
        squares = None
        if len(images) > 0:
            assert isinstance(images, torch.Tensor), "the loader of a run decodes"
            squares = to_device(images, device)
        return inputs | {"pixel_values": squares}
    raw = microbatch.normalise.affines if microbatch.normalise else {}
    for name, tensor in images.items():
        inputs[name] = raw[name](to_device(tensor, device)) if name in raw else there(tensor, device)
    assert microbatch.token_type_ids is not None, "a processor's microbatch marks its pictures' tokens"
    return inputs | {"token_type_ids": there(microbatch.token_type_ids[None], device)}


def to_device_and_known(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """For transformers' classes, which read integers back from a GPU: the host goes on knowing those."""
    if takes_gpu_path(device) and not tensor.is_floating_point():
        return known(tensor, device)
    return to_device(tensor, device)


def num_supervised(microbatch: Microbatch) -> int:
    """Supervised tokens of this microbatch alone."""
    return int((microbatch.labels != IGNORE_INDEX).sum())
