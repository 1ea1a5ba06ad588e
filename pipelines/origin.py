"""The origin of a run: what its checkpoints do not hold and its resume relies on.

Frozen weights are read from ``model.path`` again, and texts from the datasets: if either has become something
else under the same name, the run would go on with parts that were never trained together.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omnidata import Dataset
from omnidata.loader.loader import OtherVersionError
from omnidata.schema import UserError

from .checkpoint import changed_keys
from .config import ModelConfig, Recipe

_SAMPLES, _SAMPLE = (
    64,
    1 << 20,
)  # a file of weights is hashed by so many evenly spaced samples of so many bytes


def origin_of(settings: ModelConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Digests by name, as plain JSON."""
    manifest = datasets[0].manifest
    return {
        "model.path": weights_digest(settings.path) if settings.path else None,
        "tokenizer": manifest.tokenizer_fingerprint,
        "chat template": manifest.chat_template_fingerprint,
        "end of a turn": manifest.end_of_turn,
    }


def weights_digest(folder: str) -> str:
    """Hex hash of a folder's weights: names, sizes and samples of every file, so 24 GB take a second."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES if size > _SAMPLES * _SAMPLE else 1):
                file.seek(number * max(0, size - _SAMPLE) // max(1, _SAMPLES - 1))
                digest.update(file.read(_SAMPLE if size > _SAMPLES * _SAMPLE else size))
    return digest.hexdigest()


def refuse_other_origin(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """UserError that names what is no longer what the checkpoint was trained with."""
    changed = [name for name, value in current.items() if saved.get(name) != value]
    if changed:
        raise UserError(
            f"{path} cannot be resumed: {', '.join(changed)} changed since it was written, under the same "
            "name. Put the old ones back, or begin anew in another run.dir"
        )


@contextlib.contextmanager
def naming_changes(path: Path, recipe: Recipe) -> Iterator[None]:
    """A refusal of the loader's state also names the keys that did change, which it can't know."""
    try:
        yield
    except OtherVersionError as error:
        raise UserError(f"{path} cannot be resumed: {error}") from error
    except UserError as error:
        keys = [line for line in changed_keys(path, recipe) if line.startswith(("data.", "run.seed"))]
        found = "; ".join(keys) or "no key of the recipe, so a dataset was built anew under the same path"
        raise UserError(f"{path} cannot be resumed. What changed: {found}. ({error})") from error
