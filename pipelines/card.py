"""The model card of RUN/final: from which data, by which recipe, with which result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omnidata import Dataset

from .config import DatasetConfig, Recipe, RunConfig, to_yaml


def _share(config: DatasetConfig) -> str:
    return f"{config.epochs or 1:g} epochs" if config.weight is None else f"weight {config.weight:g}"


def card(
    recipe: Recipe,
    datasets: Sequence[Dataset],
    *,
    step: int,
    best: tuple[float, int] | None,
    is_mean: bool = False,
) -> str:
    """The model card; ``is_mean``: of the weights' running mean."""
    configs = [*recipe.data.train, *recipe.data.val]
    rows = [
        f"| {c.path} | {c.split} | {_share(c)} | {len(d):,} | `{d.digest}` |"
        for c, d in zip(configs, datasets, strict=True)
    ]
    return "\n".join(
        [
            f"# {Path(recipe.run.dir).name}",
            "",
            f"{_kind(datasets[0])} vision-language model, trained for {step} steps. "
            + _validation(recipe.run, step=step, best=best, is_mean=is_mean),
            *_which_weights(recipe, is_mean=is_mean),
            "",
            "```python",
            *_loading(datasets[0]),
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


def _validation(run: RunConfig, *, step: int, best: tuple[float, int] | None, is_mean: bool) -> str:
    """Which loss is whose: ``best`` is of the weights themselves, at the step at which it was lowest."""
    if best is None:
        return "No validation data."
    told = f"Lowest validation loss {best[0]:.4f}, after step {best[1]}"
    command = f"python pipelines/export.py {run.dir} --step best"
    if is_mean:
        return f"{told}, of the weights themselves; the mean's are `val_loss_ema` in `metrics.jsonl`."
    if best[1] == step:
        return f"{told}."
    return (
        f"{told}; these weights are those of step {step}. `{command}` writes those of step {best[1]}, if its "
        "checkpoint was kept."
    )


def _which_weights(recipe: Recipe, *, is_mean: bool) -> list[str]:
    """Lines of the card of a run that kept both."""
    if not recipe.optim.ema:
        return []
    mean = f"the running mean of the weights (`optim.ema: {recipe.optim.ema}`)"
    command = f"python pipelines/export.py {recipe.run.dir}"
    if is_mean:
        return ["", f"These are {mean}. `{command}` writes the weights themselves."]
    return [
        "",
        f"These are the weights themselves, not {mean}; `{command} --ema` writes that.",
    ]


def _kind(dataset: Dataset) -> str:
    return "An OmniLMM" if dataset.manifest.is_omnilmm else f"A {dataset.manifest.profile['processor']}'s"


def _loading(dataset: Dataset) -> list[str]:
    """How the folder is opened."""
    if dataset.manifest.is_omnilmm:
        return [
            "import omnimodel  # tells transformers of the class",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
        ]
    return [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        'model = AutoModelForImageTextToText.from_pretrained("this folder")',
        'processor = AutoProcessor.from_pretrained("this folder")',
    ]
