"""What can be known of a recipe before anything runs: its model's configuration and its datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnidata import Dataset
from omnidata.profiles.folder import CONFIG
from omnidata.schema import MANIFEST, UserError
from omnimodel import OmniLMMConfig
from omnimodel.packed import config_of

from .config import Recipe
from .data import model_config, open_datasets
from .processor_model import processor_config

PUBLISHED = {"vocab_size": 32009}  # OmniLMM-12B; everything else is OmniLMMConfig's default


def open_for_planning(recipe: Recipe) -> tuple[Any, list[Dataset], list[str]]:
    """The model's configuration, the training datasets ([] unless all are built), and what is assumed.

    Raises:
        UserError: nothing tells which model it is.
    """
    sources = recipe.data.train
    missing = [source.path for source in sources if not _is_built(source.path)]
    datasets = [] if missing else open_datasets(sources)
    assumed = (
        [f"assumed: photographs and text, since {', '.join(missing)} is not built yet"] if missing else []
    )
    path = recipe.model.path
    if path is not None and not (Path(path) / CONFIG).exists():
        if _is_other_class(recipe):
            raise UserError(
                f"model.path {path} has no {CONFIG}, and the recipe is not OmniLMM's: fetch the model with "
                "`hf download OWNER/NAME --local-dir DIR`; config.json and the processor's files are enough"
            )
        return (
            OmniLMMConfig(**PUBLISHED),
            datasets,
            [*assumed, f"assumed: OmniLMM-12B, since {path} is not there yet"],
        )
    if datasets:
        return model_config(recipe.model, datasets[0]), datasets, assumed
    if path is None and _is_other_class(recipe):
        raise UserError(
            f"model.config changes the configuration that {missing[0]} keeps: build it first, or name a "
            "model's folder as model.path"
        )
    if path is None:
        return OmniLMMConfig(**(PUBLISHED | (recipe.model.config or {}))), [], assumed
    config = config_of(path)
    if config.model_type == OmniLMMConfig.model_type:
        return OmniLMMConfig.from_pretrained(path), [], assumed
    return processor_config(recipe.model, None), [], assumed


def _is_built(path: str) -> bool:
    return "://" in path or (Path(path) / MANIFEST).exists()


def _is_other_class(recipe: Recipe) -> bool:
    """Does the recipe speak of a connector or of a text model's fields, as no recipe of OmniLMM does?"""
    named = {*recipe.model.freeze, *recipe.optim.component_lr, *(recipe.model.config or {})}
    return not named.isdisjoint({"connector", "text_config", "vision_config"})
