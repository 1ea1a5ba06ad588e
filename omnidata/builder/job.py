"""Job: what every worker of a build knows, and the stages that each loads once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from omnidata import corpus
from omnidata.builder.layout import Stretch
from omnidata.builder.records import Positioned, Stages
from omnidata.builder.settings import BuildSettings, settings_from_json
from omnidata.durable import Store


@dataclass(frozen=True)
class Job:
    """What every worker of a build knows. A task brings the files that it reads: there may be a million."""

    out: str
    settings: BuildSettings
    folder: str  # where the tokenizer, and the processor if there is one, are loaded from


@lru_cache(maxsize=1)
def _stages(settings_json: str, folder: str) -> Stages:
    return Stages.load(settings_from_json(json.loads(settings_json)), Store(folder))


def stages(job: Job) -> Stages:
    """This process's stages for the job; loaded once."""
    return _stages(json.dumps(job.settings.to_json()), job.folder)


def read_stretch(file: corpus.SourceFile, stretch: Stretch) -> Iterator[Positioned]:
    """(position in the whole corpus, record) of a stretch."""
    yield from enumerate(corpus.read(file, stretch.unit), start=stretch.start)
