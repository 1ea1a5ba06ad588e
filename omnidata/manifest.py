"""The manifest: ``manifest.json`` <-> ``schema.Manifest``, strict in both directions."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from omnidata.schema import SCHEMA_VERSION, Manifest, ShardInfo, UserError


def manifest_to_json(manifest: Manifest) -> bytes:
    """Stable, readable JSON: the same manifest gives the same bytes."""
    return (json.dumps(asdict(manifest), indent=1, ensure_ascii=False, sort_keys=False) + "\n").encode()


def manifest_from_json(raw: bytes, *, where: str) -> Manifest:
    """Parse and check a manifest; ``where`` names it in errors.

    Raises:
        UserError: no JSON, a schema version this code does not know, or missing / unknown keys.
    """
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise UserError(
            f"{where} is not valid JSON ({error}): the dataset is damaged, build it again"
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version!r}, this code reads version {SCHEMA_VERSION}: "
            "build the dataset again"
        )
    names = {field.name for field in fields(Manifest)}
    if data.keys() != names:
        missing, unknown = sorted(names - data.keys()), sorted(data.keys() - names)
        raise UserError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    shard_keys = {field.name for field in fields(ShardInfo)}
    if any(shard.keys() != shard_keys for shard in data["shards"]):
        raise UserError(f"{where}: a shard has other keys than {sorted(shard_keys)}: the dataset is damaged")
    shards = [ShardInfo(**shard) for shard in data.pop("shards")]
    return Manifest(**data, shards=shards)
