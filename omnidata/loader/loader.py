"""PackLoader: packs -> microbatches, the same ones for any number of ranks and workers.

    EpochPlan.steps(...)                  in the training process: what to read, no data
      -> Work (documents)                 to a worker, in order; another worker's if that one dies
      -> Assembler -> Parts               reads, decodes, lays out; back through shared memory
      -> expand -> Microbatch

The state is the position in the plan: a few integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from omnidata.loader.assembler import Assembler, OnError
from omnidata.loader.augment import Augment
from omnidata.loader.groups import Groups
from omnidata.loader.microbatch import Microbatch, Parts, expand
from omnidata.loader.pixel_source import normalisation_of, open_pixels
from omnidata.loader.reader import Document, LoadError, SampleReader, Work
from omnidata.loader.remote import Remote
from omnidata.loader.squares import Squares
from omnidata.loader.workers import TIMEOUT, Workers
from omnidata.plan.epoch import WINDOW_SAMPLES, EpochPlan, Tail
from omnidata.plan.oversize import Oversize
from omnidata.plan.places import Place, Places
from omnidata.plan.steps import Position, Step
from omnidata.plan.window import ATTENTION_COST, IMAGE_COST, Pack, Window
from omnidata.schema import IGNORE_INDEX, IM_START, Sample, UserError

_STATE_VERSION = 2


@dataclass(frozen=True, slots=True)
class State:
    """A position in training: steps done, and where the next one begins."""

    step: int = 0
    epoch: int = 0
    window: int = 0  # these and what follows: the plan's Position
    pack: int = 0
    done: int = 0
    batch: int = 0

    @property
    def position(self) -> Position:
        """Where the next step begins in its epoch."""
        return Position(self.window, self.pack, self.done, self.batch)


class OtherVersionError(UserError):
    """The state was saved by a release whose plans are others."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What the training process keeps of the work that it has handed out."""

    num_supervised_tokens: int  # of the whole step
    step: int
    epoch: int
    after: State | None  # set on a step's last microbatch


class PackLoader:
    """Yields ``microbatches_per_step`` Microbatch objects a step, on every rank.

    Args:
        data: a path, a Dataset, ``{"path", "split", "where", …}`` (plan.sources), or a list of those.
        global_batch: packs per step, over all ranks; need not divide evenly.
        max_tokens, max_images, seed, oversize, window_samples: as EpochPlan's.
        num_epochs: None goes on for ever.
        image_cost, attention_cost: tokens that one image, and a document's squared length, weigh when the
            packs of a step are dealt to ranks (``weigh`` sets them later).
        tail: an epoch's last packs, too few for a step, are a step with empty microbatches (pad) or dropped.
        image_size: pixels per side of the square that images become; None: the manifest's.
        raw_pixels: a processor's tensors as bytes, to be normalised on the device by ``normalise``; None:
            if the processor has such.
        group_by: mark documents and supervised tokens with their dataset ("dataset") or a column of the
            index, say "source"; ``group_names`` has the names. None: no mark, and no cost.
        dummy_picture: a processor's microbatches without pictures get one small black one in a document of
            its own, so that sharded ranks all call the tower.
        on_error: an unreadable sample stops the run, or is left out and counted.
        worker_timeout: seconds of waiting for one microbatch until the worker that has it in hand is named,
            killed and replaced.
    """

    def __init__(
        self,
        data: Any,
        *,
        global_batch: int,
        max_tokens: int = 4096,
        max_images: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_epochs: int | None = None,
        packs_per_microbatch: int = 1,
        image_cost: float = IMAGE_COST,
        attention_cost: float = ATTENTION_COST,
        tail: Tail = "pad",
        oversize: Oversize = "refuse",
        window_samples: int = WINDOW_SAMPLES,
        image_size: int | None = None,
        decode_images: bool = True,
        raw_pixels: bool | None = False,
        dummy_picture: bool = False,
        augment: Augment | Mapping[str, float] | None = None,
        group_by: str | None = None,
        on_error: OnError = "raise",
        checksum: bool = True,
        remote: Remote | Mapping[str, Any] | None = None,
        prefetch: int = 4,
        worker_timeout: float = TIMEOUT,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or global_batch < 1 or packs_per_microbatch < 1:
            raise UserError(f"rank {rank} of {world_size}, {global_batch} packs per step: not a valid split")
        if not worker_timeout > 0:
            raise UserError(f"worker_timeout {worker_timeout}: must be more than 0 seconds")
        self.plan = EpochPlan(
            data,
            seed=seed,
            max_tokens=max_tokens,
            max_images=max_images,
            oversize=oversize,
            window_samples=window_samples,
        )
        self._groups = Groups(self.plan.sources, group_by) if group_by else None
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.num_epochs, self.packs_per_microbatch = num_epochs, packs_per_microbatch
        self.microbatches_per_step = -(-global_batch // (world_size * packs_per_microbatch))
        self._steps: dict[str, Any] = {"global_batch": global_batch, "tail": tail}
        self.weigh(image_cost=image_cost, attention_cost=attention_cost)
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._prefetch, self._timeout = prefetch, worker_timeout
        self._state = State()
        datasets = [source.index.dataset for source in self.plan.sources]
        manifest = datasets[0].manifest
        changes: Augment | None = _as(Augment, augment) if augment else None
        if manifest.is_omnilmm:
            if dummy_picture:
                raise UserError("dummy_picture is for a processor's datasets; OmniLMM's model needs none")
            fit = manifest.settings.get("image_fit", "squash")
            images: Any = Squares(image_size or manifest.image_size, fit, changes, seed)
        else:
            images = open_pixels(
                datasets, raw=raw_pixels, with_dummy=dummy_picture, augment=changes, seed=seed
            )
        self._images, self._raw = images, not manifest.is_omnilmm and images.raw
        self._assembler = Assembler(
            SampleReader(datasets, remote=_as(Remote, remote or {}), checksum=checksum),
            images=images if decode_images else None,
            on_error=on_error,
            im_start=manifest.special_tokens[IM_START] if manifest.is_omnilmm else None,
        )

    def weigh(self, *, image_cost: float, attention_cost: float) -> None:
        """Deal packs by another model's costs, the same on all ranks. What a step holds stays the same."""
        self._steps |= {"image_cost": image_cost, "attention_cost": attention_cost}

    # --- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """The position after the last step that was yielded whole: a few integers and the plan's digest."""
        state = {name: getattr(self._state, name) for name in State.__slots__}
        return {"version": _STATE_VERSION, "digest": self.plan.digest, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, at any world size and number of workers.

        Raises:
            UserError: the state is of other data or other settings of the plan.
            OtherVersionError: it is of a release that packed and ordered samples otherwise.
        """
        if (version := state.get("version")) != _STATE_VERSION:
            raise OtherVersionError(
                f"the loader's state is of version {version}, this release reads {_STATE_VERSION}: samples "
                "were packed and ordered otherwise, so the run cannot go on in the middle of an epoch. End "
                "it with the release that began it, or begin a new one from its weights "
                "(`python pipelines/export.py RUN`)"
            )
        if state.get("digest") != self.plan.digest:
            raise UserError(
                "the loader's state is of another plan: data, split, seed, max_tokens, max_images, oversize, "
                f"exclusions or blend changed (digest {state.get('digest')} there, {self.plan.digest} here)"
            )
        self._state = State(**{name: int(state[name]) for name in State.__slots__})

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Plans the whole epoch: about a second for a million samples."""
        return self.plan.at_epoch(epoch).num_steps(self.global_batch, tail=self._steps["tail"])

    def steps_left(self) -> int:
        """Steps from the current position to the end of the last epoch; plans those epochs whole."""
        if self.num_epochs is None:
            raise ValueError("the loader goes on for ever: num_epochs is None")
        pad, total = self._steps["tail"] == "pad", 0
        for epoch in range(self._state.epoch, self.num_epochs):
            plan = self.plan.at_epoch(epoch)
            packs = plan.totals.num_packs
            if epoch == self._state.epoch:
                before = (len(plan.window(number)) for number in range(self._state.window))
                packs -= self._state.pack + self._state.done + sum(before)
            total += -(-packs // self.global_batch) if pad else packs // self.global_batch
        return total

    @property
    def group_names(self) -> tuple[str, ...]:
        """The name of each group; () without ``group_by``."""
        return self._groups.names if self._groups else ()

    @property
    def normalise(self) -> Any:
        """Makes a processor's ``raw_pixels`` its own tensors, where they are: ``normalise(mb.images)``."""
        if not self._raw:
            return dict
        return normalisation_of(self._images.profile)

    # --- iteration ----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Microbatch]:
        """From the current position to the end of the last epoch.

        The state moves on just before a step's last microbatch is yielded, so a checkpoint taken after the
        update of a step resumes at the next one.
        """
        sent: deque[Sent] = deque()  # in the order in which the answers come
        for parts in self._assemble(_remember(self._works(), sent)):
            about = sent.popleft()
            microbatch = self._expand(parts, about)
            if about.after:
                self._state = about.after
            yield microbatch

    def read(self, work: Work, about: Sent) -> Microbatch:
        """One microbatch of ``works_of_step``, read here and now; the loader's position stays."""
        return self._expand(self._assembler.assemble(work), about)

    def of_samples(self, samples: list[Sample]) -> Microbatch:
        """A microbatch of samples that somebody else has read, in no step: it counts its own tokens."""
        number = sum(int(np.count_nonzero(sample.labels[1:] != IGNORE_INDEX)) for sample in samples)
        return self._expand(self._assembler.of_samples(samples), Sent(number, 0, 0, None))

    def read_documents(self, documents: Sequence[tuple[Document, int]], after: State) -> Microbatch:
        """A microbatch of some documents of a step, each with its number of supervised tokens."""
        number = sum(number for _, number in documents)
        work = Work(tuple(document for document, _ in documents), number, after.epoch)
        return self.read(work, Sent(number, after.step - 1, after.epoch, None))

    def _expand(self, parts: Parts | LoadError, about: Sent) -> Microbatch:
        if isinstance(parts, LoadError):
            raise parts
        return expand(
            parts,
            num_supervised_tokens=about.num_supervised_tokens,
            step=about.step,
            epoch=about.epoch,
            pin_memory=self._pin_memory,
            normalise=self.normalise if self._raw else None,
        )

    def _assemble(self, works: Iterator[Work]) -> Iterator[Parts | LoadError]:
        """Parts in the order of ``works``, read by the workers or, without any, right here."""
        if not self._num_workers:
            yield from map(self._assembler.assemble, works)
            return
        with Workers(
            self._assembler, num_workers=self._num_workers, prefetch=self._prefetch, timeout=self._timeout
        ) as workers:
            yield from workers.map(works)

    def _works(self) -> Iterator[tuple[Work, Sent]]:
        """This rank's work from the current position on, epoch after epoch."""
        for step, after, places in self.steps_from(self._state):
            yield from self.works_of_step(step, after, places, rank=self.rank)

    def steps_from(self, state: State) -> Iterator[tuple[Step, State, _PlacesOfWindows]]:
        """The steps from a position on, epoch after epoch: each with the position behind it."""
        while self.num_epochs is None or state.epoch < self.num_epochs:
            begun = state
            plan = self.plan.at_epoch(state.epoch)
            places = _PlacesOfWindows(plan, self._groups)
            for step in plan.steps(self.world_size, start=state.position, **self._steps):
                state = State(state.step + 1, state.epoch, *astuple(step.after))
                yield step, state, places
            if state == begun == State(begun.step, begun.epoch):
                raise UserError(
                    f"an epoch has fewer packs than one step takes ({self.global_batch}): "
                    "lower global_batch or max_tokens, or say tail=pad (data.tail in a recipe)"
                )
            state = State(step=state.step, epoch=state.epoch + 1)

    def works_of_step(
        self, step: Step, after: State, places: _PlacesOfWindows, *, rank: int
    ) -> Iterator[tuple[Work, Sent]]:
        """What a rank reads for each of its microbatches."""
        mine = [step.packs[position] for position in step.ranks[rank]]
        denominator = step.num_supervised
        for number in range(self.microbatches_per_step):
            first = number * self.packs_per_microbatch
            packs = mine[first : first + self.packs_per_microbatch]
            documents = tuple([document for pack in packs for document in places.documents(pack)])
            work = Work(documents, sum(pack.num_supervised for pack in packs), after.epoch)
            last = number == self.microbatches_per_step - 1
            yield work, Sent(denominator, after.step - 1, after.epoch, after if last else None)


def _remember(works: Iterator[tuple[Work, Sent]], sent: deque[Sent]) -> Iterator[Work]:
    """Keep what belongs to the work that was handed out."""
    for work, about in works:
        sent.append(about)
        yield work


def _as(kind: type, value: Any) -> Any:
    """A settings object from itself or from a recipe's mapping."""
    if isinstance(value, kind):
        return value
    unknown = sorted(value.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise UserError(f"{kind.__name__.lower()} has no setting {unknown}")
    return kind(**value)


class _PlacesOfWindows:
    """Where the samples of the last two windows are (a step may reach from one into the next)."""

    def __init__(self, plan: EpochPlan, groups: Groups | None = None) -> None:
        self._groups = groups
        self._plan = plan
        self._places: dict[int, dict[int, Places]] = {}  # read -> dataset -> places

    def documents(self, pack: Pack) -> list[Document]:
        """The documents of a pack."""
        of_dataset = self._of_window(pack.window)
        places: list[Place] = [None] * len(pack.dataset)  # type: ignore[list-item]
        for dataset, found in of_dataset.items():
            mine = np.flatnonzero(pack.dataset == dataset)
            for position, place in zip(mine.tolist(), found.find(pack.lengths.rows[mine]), strict=True):
                places[position] = place
        numbers = (pack.lengths.tokens, pack.lengths.images, pack.passes)
        columns = [pack.dataset.tolist(), places, *(column.tolist() for column in numbers)]
        pixels: list[tuple[int, ...]] = [()] * len(places)
        bases: list[Place | None] = [None] * len(places)
        for dataset, found in of_dataset.items():
            mine = np.flatnonzero(pack.dataset == dataset)
            for position, each in zip(mine.tolist(), found.pixels(pack.lengths.rows[mine]), strict=True):
                pixels[position] = each[: int(pack.lengths.images[position])]
            for position, base in zip(mine.tolist(), found.bases(pack.lengths.rows[mine]), strict=True):
                bases[position] = base
        groups: list[int | None] = [None] * len(places)
        for dataset in of_dataset:
            if self._groups is None:
                break
            mine = np.flatnonzero(pack.dataset == dataset)
            codes = self._groups.codes(dataset, pack.lengths.rows[mine])
            for position, code in zip(mine.tolist(), codes, strict=True):
                groups[position] = code
        return [Document(*values) for values in zip(*columns, pixels, groups, bases, strict=True)]

    def _of_window(self, window: Window) -> dict[int, Places]:
        read = window.number // self._plan.windows_a_read  # an ordered window has samples of every shard
        if read not in self._places:
            rows = self._plan.rows_of_read(read, window)
            self._places[read] = {
                dataset: self._plan.sources[dataset].index.locate(mine) for dataset, mine in rows.items()
            }
            for old in sorted(self._places)[:-2]:
                del self._places[old]
        return self._places[read]
