"""The manifest: ``manifest.json`` <-> ``schema.Manifest``, strict in both directions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from typing import Any

from omnidata.origin import is_origin
from omnidata.schema import IMAGE_TOKENS, SCHEMA_VERSION, SHARDS_DIR, Manifest, ShardInfo, UserError

MAX_NUMBER = 1 << 62  # sums of a few still fit an int64
MAX_DEPTH = 64  # of nested values: a build's settings have three
# A shard lies in the dataset's own folder, whatever a manifest of somebody else's says.
SHARD_PATH = re.compile(rf"{SHARDS_DIR}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")


def manifest_to_json(manifest: Manifest) -> bytes:
    """Stable, readable JSON: the same manifest gives the same bytes."""
    optional = _optional()
    values = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}  # nothing is copied
    values["shards"] = [asdict(shard) for shard in manifest.shards]
    content = {k: v for k, v in values.items() if k not in optional or v != optional[k]}
    return (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n").encode()


def manifest_from_json(raw: bytes, *, where: str) -> Manifest:
    """Parse and check a manifest; ``where`` names it in errors.

    Raises:
        UserError: no JSON, a schema version this code does not know, or missing / unknown keys.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not valid JSON ({error}): the dataset is damaged, build it again"
        ) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version!r}, this code reads version {SCHEMA_VERSION}: "
            "build the dataset again"
        )
    names = {field.name for field in fields(Manifest)}
    data = _optional() | data
    if data.keys() != names:
        missing, unknown = sorted(names - data.keys()), sorted(data.keys() - names)
        raise UserError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    problem = next(_problems(data), None)
    if problem is not None:
        raise UserError(f"{where}: {problem}: the dataset is damaged, build it again")
    shards = [ShardInfo(**shard) for shard in data.pop("shards")]
    return Manifest(**data, shards=shards)


def _optional() -> dict[str, Any]:
    """Keys that a manifest lacks if there is nothing to say, with what that means."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(Manifest)
        if field.name != "shards" and (field.default, field.default_factory) != (MISSING, MISSING)
    }


# --- what a value may be ------------------------------------------------------------------------------------


def check_agreement(manifest: Manifest, *, where: str) -> None:
    """Refuse a manifest that contradicts itself in what reading needs; ``omnidata verify`` lists it all.

    Raises:
        UserError: the shards of the splits do not add up to the splits, or an image token has no id.
    """
    found = Counter[str]()
    for shard in manifest.shards:
        found[shard.split] += shard.num_samples
    for split in sorted(found.keys() | manifest.splits.keys()):
        if found[split] != manifest.splits.get(split, 0):
            what = f"the shards of split {split!r} hold {found[split]} samples, the manifest says "
            what += f"{manifest.splits.get(split, 0)}"
            raise UserError(f"{where}: {what}: the dataset is damaged, run `omnidata verify`")
    if not manifest.is_omnilmm:
        return
    if missing := [name for name in IMAGE_TOKENS if name not in manifest.special_tokens]:
        raise UserError(f"{where}: special_tokens lacks {missing[0]}: the dataset is damaged, build it again")


def _problems(data: dict[str, Any]) -> Iterator[str]:
    """Everything in which the values are not those of a manifest."""
    for field in fields(Manifest):
        if field.name != "shards" and not _is(data[field.name], str(field.type)):
            yield f"{field.name} is {_short(data[field.name])}, not a {field.type} in range"
    yield from _profile_problems(data["profile"])
    if isinstance(data["origin"], dict) and not is_origin(data["origin"]):
        yield f"origin is {_short(data['origin'])}, which does not say what was copied from where"
    if data["base"] and not all(_is(data["base"].get(k), kind) for k, kind in BASE_KEYS.items()):
        yield f"base is {_short(data['base'])}, without the keys {sorted(BASE_KEYS)}"
    if not isinstance(data["shards"], list):
        yield f"shards is {_short(data['shards'])}, not a list"
        return
    types = {field.name: str(field.type) for field in fields(ShardInfo)}
    seen: set[str] = set()
    for shard in data["shards"]:
        if not isinstance(shard, dict) or shard.keys() != types.keys():
            yield f"a shard is {_short(shard)}, without the keys {sorted(types)}"
            continue
        for name, kind in types.items():
            if not _is(shard[name], kind):
                yield f"{name} of a shard is {_short(shard[name])}, not a {kind} in range"
        if not isinstance(shard["path"], str) or not SHARD_PATH.fullmatch(shard["path"]):
            yield f"{_short(shard['path'])} is no path of a shard ({SHARDS_DIR}/NAME.tar)"
        elif shard["path"] in seen:
            yield f"{shard['path']} is listed twice"
        seen.add(str(shard["path"]))


BASE_KEYS = {"digest": "str", "name": "str", "num_samples": "int", "num_bytes": "int"}
OMNILMM_KEYS = {"num_query": "int", "image_size": "int"}
PROCESSOR_KEYS = {
    "processor": "str",
    "arguments": "dict[str, Any]",
    "image_token": "str",
    "image_token_ids": "list[int]",
    "fingerprint": "dict[str, Any]",
}


def _profile_problems(profile: Any) -> Iterator[str]:
    """In what the profile is none of omnidata.profiles."""
    kinds = {"omnilmm": OMNILMM_KEYS, "processor": PROCESSOR_KEYS}
    name = profile.get("name") if isinstance(profile, dict) else None
    if not isinstance(name, str) or name not in kinds:
        yield f"profile is {_short(profile)}, not one of {', '.join(kinds)}"
        return
    for key, kind in kinds[name].items():
        if not _is(profile.get(key), kind):
            yield f"{key} of the profile is {_short(profile.get(key))}, not a {kind} in range"


def _is(value: Any, kind: str) -> bool:
    """Whether a parsed value is of the type that a field of the schema declares."""
    if kind == "int":
        return type(value) is int and 0 <= value < MAX_NUMBER
    if kind == "str":
        return isinstance(value, str)
    outer, _, inner = kind.rstrip("]").partition("[")
    if outer == "list":
        return isinstance(value, list) and all(_is(item, inner) for item in value)
    if outer == "dict":
        if not isinstance(value, dict):
            return False
        of_values = inner.partition(", ")[2]
        return all(_is(item, of_values) for item in value.values()) if of_values else _is_plain(value)
    assert kind == "Any", kind
    return _is_plain(value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """JSON of a few levels without numbers beyond what a setting may be."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item, depth + 1) for item in value)
    return not isinstance(value, int) or abs(value) < MAX_NUMBER


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
