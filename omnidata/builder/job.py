"""Job: what every worker of a build knows, and the stages that each loads once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from omnidata import corpus
from omnidata.builder.base_records import BASE_SHAPE, read_base
from omnidata.builder.layout import Stretch
from omnidata.builder.records import Positioned, Stages
from omnidata.builder.settings import BuildSettings, settings_from_json
from omnidata.builder.view_records import ViewStages
from omnidata.durable import Store


@dataclass(frozen=True)
class Job:
    """What every worker of a build knows. A task brings the files that it reads: there may be a million."""

    out: str
    settings: BuildSettings
    folder: str  # where the tokenizer, and the processor if there is one, are loaded from
    base: str = ""  # of a view: the dataset whose samples are its records
    refetch: bool = False  # of a view: read images that do not suit again


@lru_cache(maxsize=1)
def _stages(settings_json: str, folder: str, is_view: bool, refetch: bool) -> Stages:
    settings = settings_from_json(json.loads(settings_json))
    if not is_view:
        return Stages.load(settings, Store(folder))
    loaded = ViewStages.load(settings, Store(folder))
    assert isinstance(loaded, ViewStages), "load makes one of its own class"
    loaded.refetch = refetch
    return loaded


def stages(job: Job) -> Stages:
    """This process's stages for the job; loaded once."""
    return _stages(json.dumps(job.settings.to_json()), job.folder, bool(job.base), job.refetch)


def read_stretch(file: corpus.SourceFile, stretch: Stretch) -> Iterator[Positioned]:
    """(position in the whole corpus, record) of a stretch."""
    read = read_base if file.shape == BASE_SHAPE else corpus.read
    yield from enumerate(read(file, stretch.unit), start=stretch.start)
