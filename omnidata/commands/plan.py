"""``omnidata plan``, once its options are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omnidata.plan.cost import assumptions
from omnidata.plan.oversize import Oversize
from omnidata.printable import to_json


def plan(
    paths: Sequence[str],
    *,
    split: str | None,
    where: Sequence[str],
    cap: int | None,
    cap_by: str | None,
    order: str | None,
    seed: int,
    epoch: int,
    max_tokens: int | None,
    max_images: int | None,
    oversize: Oversize,
    global_batch: int | None,
    world_size: int,
    as_json: bool,
    **cost: Any,
) -> None:
    """Print the forecast of an epoch over these datasets, as text or JSON."""
    from omnidata.inspect import terminal
    from omnidata.plan.epoch import EpochPlan
    from omnidata.plan.forecast import forecast
    from omnidata.plan.recipe import open_entries

    assume = assumptions(default_gpus=world_size, **cost)
    entries, limits = open_entries(paths, split=split, where=where, cap=cap, cap_by=cap_by, order=order)
    epoch_plan = EpochPlan(
        entries,
        seed=seed,
        epoch=epoch,
        max_tokens=max_tokens or limits.get("max_tokens") or 4096,
        max_images=limits.get("max_images") if max_images is None else max_images,
        oversize=oversize,
    )
    global_batch = global_batch or limits.get("global_batch")
    foreseen = forecast(epoch_plan, world_size=world_size, global_batch=global_batch, assume=assume)
    if as_json:
        print(to_json(foreseen.as_dict()))
    else:
        terminal.print_forecast(terminal.make_console(), foreseen)
