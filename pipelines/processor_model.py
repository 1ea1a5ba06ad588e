"""The model of a processor's datasets: its configuration, and whether data, processor and model fit.

model.path     a model's folder: config.json, safetensors, the processor's files
model.config   changes to the config.json that the dataset keeps (processor/config.json): random weights
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from omnidata import Dataset
from omnidata.profiles.fingerprint import describe, fingerprint_of
from omnidata.profiles.folder import load_processor, model_config
from omnidata.profiles.opening import open_profile, processor_folder
from omnidata.profiles.positions import UNKNOWN
from omnidata.profiles.processor import ProcessorProfile
from omnidata.schema import UserError
from omnimodel.packed import class_for

from .config import ModelConfig

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def processor_config(settings: ModelConfig, dataset: Dataset | None) -> Any:
    """The configuration of the model to train; ``dataset`` is asked unless there is a ``model.path``.

    Raises:
        UserError: there is none, or ``model.config`` names what it does not have.
    """
    if settings.path is not None:
        config = model_config(settings.path)
        if config is None:
            raise UserError(
                f"model.path {settings.path} is no model folder: it has no config.json. Fetch the "
                "model with `hf download OWNER/NAME --local-dir DIR`, or take RUN/final of an earlier run"
            )
        return _known(config)
    assert dataset is not None, "without model.path the class is the dataset's"
    kept = model_config(processor_folder(dataset.path))
    if kept is None:
        raise UserError(
            f"{dataset.path} was built without the model's config.json, so model.config has nothing to "
            "change: build it with --model of a model's folder, or give model.path"
        )
    tree = kept.to_dict()
    problems = list(_unknown(settings.config or {}, tree, "model.config"))
    if problems:
        raise UserError("\n  ".join(problems))
    _merge(tree, settings.config or {})
    try:
        return _known(type(kept).from_dict(tree))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.config cannot be built: {error}") from error


def _known(config: PreTrainedConfig) -> Any:
    """The same, if transformers has a class for it."""
    try:
        class_for(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


def _unknown(changes: Mapping[str, Any], tree: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, value in changes.items():
        if key not in tree:
            yield f"{where}.{key}: the model's config.json has no such field"
        elif isinstance(value, Mapping) and isinstance(tree[key], Mapping) and key.endswith("_config"):
            yield from _unknown(value, tree[key], f"{where}.{key}")


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


# --- do they fit? -----------------------------------------------------------------------------------------


def processor_mismatches(
    settings: ModelConfig, datasets: Sequence[Dataset], config: PreTrainedConfig
) -> Iterator[str]:
    """Everything in which datasets, model and recipe do not fit, a line each."""
    first = datasets[0]
    for dataset in datasets:
        yield from _dataset_mismatches(dataset, first, config)
    for name in ("", *config.sub_configs):
        dropout = getattr(getattr(config, name) if name else config, "attention_dropout", None)
        if dropout:
            where = f"{name}.attention_dropout" if name else "attention_dropout"
            yield f"the model's {where} is {dropout}: packs need 0.0 (its config.json)"
    if settings.train_only_new_tokens:
        yield "model.train_only_new_tokens: a processor's dataset adds no tokens"
    yield from _other_processor(settings.path, first)


def _dataset_mismatches(dataset: Dataset, first: Dataset, config: PreTrainedConfig) -> Iterator[str]:
    name, manifest, text = dataset.path, dataset.manifest, config.get_text_config()
    for field in ("tokenizer_fingerprint", "chat_template_fingerprint"):
        mine, other = getattr(manifest, field), getattr(first.manifest, field)
        if mine != other:
            yield f"{name}: {field} {mine[:12]}, but {first.path} has {other[:12]}"
    if manifest.end_of_turn != first.manifest.end_of_turn:
        other = first.manifest.end_of_turn
        yield f"{name}: turns end with {manifest.end_of_turn}, but in {first.path} with {other}"
    if manifest.vocab_size > text.vocab_size:
        yield f"{name}: vocabulary {manifest.vocab_size}, but the model's is {text.vocab_size}"
    feature, ids = getattr(config, "image_token_id", None), manifest.profile["image_token_ids"]
    if feature is not None and feature not in ids:
        yield f"{name}: pictures are tokens {ids}, but the model's image_token_id is {feature}"
    if manifest.profile["positions"] == UNKNOWN:
        yield f"{name}: built without the model's config.json, so its positions are not known; build it anew"


def _other_processor(path: str | None, dataset: Dataset) -> Iterator[str]:
    """The model's folder may carry a processor: it must do what the dataset's did."""
    if path is None or not any((Path(path) / name).exists() for name in PROCESSOR_FILES):
        return
    arguments = open_profile(dataset.path, dataset.manifest).arguments
    now = fingerprint_of(ProcessorProfile(load_processor(path), arguments))
    for line in describe(dataset.manifest.profile["fingerprint"], now)[:3]:
        yield f"{path}: its processor is not the one of {dataset.path}: {line}"
