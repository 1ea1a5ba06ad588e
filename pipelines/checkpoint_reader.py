"""Reads a checkpoint's tensors without running anybody's code.

torch.distributed.checkpoint keeps its table of contents (``.metadata``) as a pickle, and a pickle may call
whatever it names. A run folder that came from somebody else is opened here with an unpickler that knows only
the classes of which such a table consists. Values that DCP would itself unpickle (``BytesStorageMetadata``)
are not among them: our checkpoints hold tensors only.
"""

from __future__ import annotations

import enum
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from omnidata.schema import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    (
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    )
)


class CheckpointReader(dcp.FileSystemReader):
    """``dcp.FileSystemReader`` for folders of strangers."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents.

        Raises:
            UserError: it names something that no table of contents holds.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
                raise UserError(f"{path} is no table of contents of a checkpoint: {error}") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} is no table of contents of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype | torch.layout):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of a run holds")


def _member(kind: Any, name: str) -> Any:
    """As Python 3.11.0 to 3.11.3 write the member of an enumeration; nothing else may be got."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks {kind!r} for {name}, which no checkpoint of a run does")
