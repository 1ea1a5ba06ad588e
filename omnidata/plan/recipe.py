"""A recipe's ``data``, as far as a plan needs it: for ``omnidata plan RECIPE.yaml`` and its flags.

The rest of a recipe is checked by those who train with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omnidata.schema import UserError

LIMITS = ("max_tokens", "max_images", "global_batch")


def open_entries(
    paths: Sequence[str], *, split: str | None, where: Sequence[str], **given: Any
) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """Entries for ``plan.sources``, and the limits of the recipes among ``paths``.

    Args:
        paths: datasets, and recipes (.yaml), which stand for the datasets of their ``data.train``.
        where: one condition for all datasets, or one for each; "" is none.
        split, given: the same for every dataset; None leaves a recipe's own.

    Raises:
        UserError: a recipe that cannot be read or has no ``data.train``, or too many conditions.
    """
    entries: list[dict[str, object]] = []
    limits: dict[str, object] = {}
    for path in paths:
        if not path.endswith((".yaml", ".yml")):
            entries.append({"path": path})
            continue
        data = _data(path)
        entries += [{"path": entry} if isinstance(entry, str) else dict(entry) for entry in data["train"]]
        if wrong := [name for name in LIMITS if type(data.get(name)) not in (int, type(None))]:
            raise UserError(f"{path}: data.{wrong[0]} is {data[wrong[0]]!r}, not a whole number")
        limits |= {name: data[name] for name in LIMITS if data.get(name) is not None}
    if len(where) not in (0, 1, len(entries)):
        raise UserError(
            f"{len(where)} --where for {len(entries)} datasets: give one for all, or one for each"
        )
    conditions = where if len(where) == len(entries) else [*where, None][:1] * len(entries)
    same = {name: value for name, value in {"split": split, **given}.items() if value is not None}
    return [
        entry | same | ({} if condition is None else {"where": condition or None})
        for entry, condition in zip(entries, conditions, strict=True)
    ], limits


def _data(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    data = content.get("data") if isinstance(content, Mapping) else None
    data = dict(data) if isinstance(data, Mapping) else {}
    train = data.get("train")
    if not isinstance(train, list) or not all(isinstance(entry, str | Mapping) for entry in train):
        raise UserError(f"{path} has no list of datasets under data.train: it is no recipe")
    return data
