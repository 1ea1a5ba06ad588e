"""View: a dataset whose ids and labels are made anew from another's KEY.json; the images stay where they are.

    base ─open_view──▶ View             the base, and what the build of the view is told
         ─view_settings──▶ settings     the base's, with what the user changes
         ─open_view_inputs──▶           identity (the base by content) and renderer
         ─plan_of──▶ BuildPlan          the base's rows, each shard's in its split

From there on a view is built as any dataset: the same workers, rejects, resuming and last steps.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omnidata.builder.base_records import base_file, base_stretches
from omnidata.builder.build_plan import BuildPlan
from omnidata.builder.identity import identity_of
from omnidata.builder.inputs import Inputs, save_model, save_tokenizer
from omnidata.builder.records import renderer_of
from omnidata.builder.settings import OMNILMM_ONLY, TRAIN, BuildSettings, settings_from_json
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.schema import PROCESSOR_DIR, TOKENIZER_DIR, UserError
from omnidata.text.tokenizer import fingerprint, template_fingerprint
from omnidata.view_base import base_entry

# What a view has of its own, whatever the build of its base was told.
_OWN = {
    "samples_per_shard": None,
    "shard_bytes": None,
    "dedup": "off",
    "duplicate_ids": "keep",
    "conversation": False,  # the base has them
    "chat_template": None,  # the base's tokenizer has it
}
_FETCHING = ("image_root", "allow_http", "allow_remote", "allow_any_path")


@dataclass(frozen=True, eq=False)
class View:
    """What a view is built from."""

    base: Dataset
    path: str  # of the base, as the user gave it
    settings: BuildSettings
    has_own_model: bool  # neither --model nor --tokenizer: those in the base's folder
    refetch: bool = False


def open_view(path: str, given: Mapping[str, Any], *, out: str, refetch: bool = False) -> View:
    """Open the base and work out the settings; ``given`` has the values of flags that the user gave.

    Raises:
        UserError: the base cannot be rendered again, or not so.
    """
    base = Dataset(path)
    if base.base is not None:
        raise UserError(
            f"{path} is a view, and has no conversations of its own: render its base again, "
            f"omnidata render {base.base.path}"
        )
    if not base.manifest.num_dialogue_bytes:
        raise UserError(
            f"{path} keeps no conversations (KEY.json): it was built with --no-conversation, or before there "
            "were any. Build it again from its corpus"
        )
    if os.path.realpath(Store(out).full("")) == os.path.realpath(Store(path).full("")):
        raise UserError(f"--out {out} is the dataset that is rendered: choose another --out")
    if refetch and not given.get("image_root"):
        was = base.manifest.settings.get("image_root")
        hint = f" (the build's was {was})" if was else ""
        raise UserError(f"--refetch reads images from their source: say where with --image-root{hint}")
    if not refetch and (unused := [name for name in _FETCHING if given.get(name)]):
        raise UserError(f"--{unused[0].replace('_', '-')} is for --refetch: no image is read without it")
    has_own_model = not given.get("model") and not given.get("tokenizer")
    return View(base, path, view_settings(base, given), has_own_model, refetch)


def view_settings(base: Dataset, given: Mapping[str, Any]) -> BuildSettings:
    """The settings of the base's build with those that the user gave."""
    manifest = base.manifest
    known = {setting.name for setting in fields(BuildSettings)}
    values = {name: value for name, value in manifest.settings.items() if name in known}
    values |= _OWN | {"image_policy": manifest.image_policy, "split": _splits(base)}
    values.setdefault("source", [entry["source"] for entry in manifest.inputs])
    if given.get("model") or given.get("tokenizer"):
        gone = {"model", "tokenizer", "processor_arg"}
        if manifest.is_omnilmm != bool(given.get("tokenizer")):
            gone |= {"max_length", *OMNILMM_ONLY}
        values = {name: value for name, value in values.items() if name not in gone}
    values |= {name: value for name, value in given.items() if name in known}
    settings = settings_from_json(values)
    if settings.max_slices and settings.image_size != manifest.image_size:
        raise UserError(
            f"{base.path} has large images cut into tiles for --image-size {manifest.image_size}: another "
            "size needs other tiles, and so a build from the corpus"
        )
    return settings


def _splits(base: Dataset) -> dict[str, float]:
    """Names of the base's splits. Each sample stays in its own; the shares are only told."""
    total = max(1, base.manifest.num_samples)
    counts = {name: count for name, count in base.manifest.splits.items() if name != TRAIN}
    told = base.manifest.settings.get("split")
    if isinstance(told, dict) and told.keys() >= counts.keys():
        return told
    return {name: min(count / total, 0.999 / len(counts)) for name, count in counts.items()}


def open_view_inputs(view: View, folder: str) -> Inputs:
    """What a view is built from; ``folder`` gets ``tokenizer/``, and ``processor/`` if there is one."""
    settings = view.settings
    store = Store(view.base.path)
    if settings.model:
        source = store.local_copy(PROCESSOR_DIR) if view.has_own_model else settings.model
        renderer, profile = save_model(settings, folder, source=source)
    else:
        source = store.local_copy(TOKENIZER_DIR) if view.has_own_model else settings.tokenizer
        place = f"{folder}/{TOKENIZER_DIR}"
        renderer = renderer_of(settings, save_tokenizer(source, place, chat_template=settings.chat_template))
        profile = OmniLMMProfile(settings.num_query, settings.image_size).to_json()
    tokenizer = renderer.tokenizer
    marks = {"behaviour": fingerprint(tokenizer), "chat template": template_fingerprint(tokenizer)}
    identity = identity_of(settings, (), marks, profile)
    identity |= {"inputs": _inputs(view.base), "base": entry_of(view.base)}
    return Inputs((base_file(view.base),), identity, renderer)


def entry_of(base: Dataset) -> dict[str, Any]:
    """What a view's manifest says of its base."""
    num_bytes = sum(shard.num_bytes for shard in base.manifest.shards)
    return base_entry(base.content_digest, base.path, base.manifest.num_samples, num_bytes)


def _inputs(base: Dataset) -> list[dict[str, Any]]:
    """The base's inputs; the records of each are those that are samples of the base."""
    pairs = base.index_columns(["source"])["source"].value_counts().to_pylist()
    left = Counter({pair["values"]: pair["counts"] for pair in pairs})
    inputs = [entry | {"num_records": left.pop(entry["source"], 0)} for entry in base.manifest.inputs]
    lost = {"format": "", "num_bytes": 0, "digest": ""}  # sources that a repair of the index has lost
    return inputs + [lost | {"source": source, "num_records": count} for source, count in left.items()]


def plan_of(view: View, identity: dict[str, Any]) -> BuildPlan:
    """Every row of the base, in its order and its split."""
    return BuildPlan(identity, base_stretches(view.base, view.settings.splits), ())
