"""PackLoader: packs -> microbatches, the same ones for any number of ranks and workers.

    EpochPlan.steps(...)                  in the training process: what to read, no data
      -> Work (documents)                 to a worker, in order
      -> SampleReader.read                one ranged read a sample
      -> decode, resize                   uint8, straight into shared memory
      -> lay_out -> Parts                 back to the training process
      -> expand -> Microbatch

The state is the position in the plan: a few integers. Workers hold no index, no order and no state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from omnidata.catalog import Places
from omnidata.microbatch import Microbatch, Parts, expand, lay_out
from omnidata.oversize import Oversize
from omnidata.plan import IMAGE_COST, WINDOW_SAMPLES, EpochPlan, Pack, Position, Step, Tail, Window
from omnidata.reader import Document, LoadError, SampleReader
from omnidata.schema import IGNORE_INDEX, IM_START, RejectError, Sample, UserError

OnError = Literal["raise", "skip"]
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class State:
    """A position in training: steps done, and where the next one begins."""

    step: int = 0
    epoch: int = 0
    window: int = 0
    pack: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What to read for one microbatch."""

    documents: tuple[Document, ...]
    num_supervised_tokens: int  # of the whole step
    step: int
    epoch: int
    after: State | None  # set on a step's last microbatch


class PackLoader:
    """Yields ``microbatches_per_step`` Microbatch objects a step, on every rank.

    Args:
        data: a path, a Dataset, ``{"path", "split", "weight" | "epochs", "exclude"}``, or a list of those.
        global_batch: packs a step, over all ranks; need not divide evenly.
        max_tokens, max_images, seed, oversize, window_samples: as EpochPlan's.
        num_epochs: None goes on for ever.
        image_cost: tokens that one image weighs when work is dealt to ranks.
        tail: the packs of an epoch's last, incomplete step are dropped, or padded with empty microbatches.
        image_size: pixels of the square that images are squashed to; None: the manifest's.
        on_error: an unreadable sample stops the run, or is left out and counted.
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
        tail: Tail = "drop",
        oversize: Oversize = "refuse",
        window_samples: int = WINDOW_SAMPLES,
        image_size: int | None = None,
        decode_images: bool = True,
        on_error: OnError = "raise",
        checksum: bool = False,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or global_batch < 1 or packs_per_microbatch < 1:
            raise UserError(f"rank {rank} of {world_size}, {global_batch} packs a step: not a valid split")
        self.plan = EpochPlan(
            data,
            seed=seed,
            max_tokens=max_tokens,
            max_images=max_images,
            oversize=oversize,
            window_samples=window_samples,
        )
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.num_epochs, self.packs_per_microbatch = num_epochs, packs_per_microbatch
        self.microbatches_per_step = -(-global_batch // (world_size * packs_per_microbatch))
        self._steps = {"global_batch": global_batch, "image_cost": image_cost, "tail": tail}
        self._num_workers, self._prefetch, self._pin_memory = num_workers, prefetch, pin_memory
        self._state = State()
        datasets = [source.catalog.dataset for source in self.plan.sources]
        manifest = datasets[0].manifest
        self._worker = Worker(
            SampleReader(datasets, checksum=checksum),
            image_size=image_size or manifest.image_size,
            decode_images=decode_images,
            on_error=on_error,
            im_start=manifest.special_tokens[IM_START],
        )

    # --- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was yielded whole: a few integers and the plan's digest."""
        state = {name: getattr(self._state, name) for name in State.__slots__}
        return {"version": _STATE_VERSION, "digest": self.plan.digest, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, at any world size and number of workers.

        Raises:
            UserError: the state is of other data or other settings of the plan.
        """
        if state.get("version") != _STATE_VERSION or state.get("digest") != self.plan.digest:
            raise UserError(
                "the loader's state is of another plan: data, split, seed, max_tokens, max_images, oversize, "
                f"exclusions or blend changed (digest {state.get('digest')} there, {self.plan.digest} here)"
            )
        self._state = State(**{name: int(state[name]) for name in State.__slots__})

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Plans the whole epoch: about a second for a million samples."""
        return self.plan.at_epoch(epoch).num_steps(self.global_batch, tail=self._steps["tail"])

    # --- iteration ----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Microbatch]:
        """From the current position to the end of the last epoch.

        The state moves on just before a step's last microbatch is yielded, so a checkpoint taken after the
        update of a step resumes at the next one.
        """
        sent: deque[Work] = deque()
        for parts in self._read(_remember(self._works(), sent)):
            work = sent.popleft()
            if isinstance(parts, LoadError):
                raise parts
            microbatch = expand(
                parts, num_supervised_tokens=work.num_supervised_tokens, step=work.step, epoch=work.epoch
            )
            if work.after:
                self._state = work.after
            yield microbatch

    def _read(self, works: Iterator[Work]) -> Iterator[Parts | LoadError]:
        """Parts in the order of ``works``, read by the workers."""
        import torch
        from torch.utils.data import DataLoader

        yield from DataLoader(
            self._worker,  # type: ignore[arg-type]
            batch_size=None,
            sampler=works,  # type: ignore[arg-type]
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # of its own: the training's random state stays untouched
        )

    def _works(self) -> Iterator[Work]:
        """This rank's work from the current position on, epoch after epoch."""
        state = self._state
        while self.num_epochs is None or state.epoch < self.num_epochs:
            begun = state
            plan = self.plan.at_epoch(state.epoch)
            places = _PlacesOfWindows(plan)
            for step in plan.steps(self.world_size, start=Position(state.window, state.pack), **self._steps):
                state = State(state.step + 1, state.epoch, step.after.window, step.after.pack)
                yield from self._works_of_step(step, state, places)
            if state == begun == State(begun.step, begun.epoch):
                raise UserError(
                    f"an epoch has fewer packs than one step takes ({self.global_batch}): "
                    "lower global_batch or max_tokens, or say tail=pad"
                )
            state = State(step=state.step, epoch=state.epoch + 1)

    def _works_of_step(self, step: Step, after: State, places: _PlacesOfWindows) -> Iterator[Work]:
        mine = [step.packs[position] for position in step.ranks[self.rank]]
        for number in range(self.microbatches_per_step):
            first = number * self.packs_per_microbatch
            packs = mine[first : first + self.packs_per_microbatch]
            yield Work(
                documents=tuple(document for pack in packs for document in places.documents(pack)),
                num_supervised_tokens=step.num_supervised,
                step=after.step - 1,
                epoch=after.epoch,
                after=after if number == self.microbatches_per_step - 1 else None,
            )


def _remember(works: Iterator[Work], sent: deque[Work]) -> Iterator[Work]:
    """Keep what was handed out: answers come back in the same order."""
    for work in works:
        sent.append(work)
        yield work


class _PlacesOfWindows:
    """Where the samples of the last two windows are (a step may reach from one into the next)."""

    def __init__(self, plan: EpochPlan) -> None:
        self._plan = plan
        self._places: dict[int, dict[int, Places]] = {}  # window -> dataset -> places

    def documents(self, pack: Pack) -> Iterator[Document]:
        """The documents of a pack."""
        places = self._of_window(pack.window)
        lengths = pack.lengths
        columns = (
            pack.dataset,
            lengths.rows,
            lengths.tokens,
            lengths.supervised,
            lengths.images,
            pack.passes,
        )
        for dataset, row, tokens, supervised, images, passes in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            yield Document(dataset, places[dataset][row], tokens, supervised, images, passes)

    def _of_window(self, window: Window) -> dict[int, Places]:
        if window.number not in self._places:
            datasets = np.unique(window.dataset).tolist()
            catalogs = {dataset: self._plan.sources[dataset].catalog for dataset in datasets}
            rows = {dataset: window.lengths.rows[window.dataset == dataset] for dataset in datasets}
            self._places[window.number] = {
                dataset: catalogs[dataset].locate(rows[dataset]) for dataset in datasets
            }
            for old in sorted(self._places)[:-2]:
                del self._places[old]
        return self._places[window.number]


class Worker:
    """Reads and lays out one microbatch; runs in a worker process, or in the training process itself."""

    def __init__(
        self, reader: SampleReader, *, image_size: int, decode_images: bool, on_error: OnError, im_start: int
    ) -> None:
        self._reader, self._image_size, self._decode_images = reader, image_size, decode_images
        self._on_error, self._im_start = on_error, im_start

    def __getitem__(self, work: Work) -> Parts | LoadError:
        """A LoadError is returned, not raised: torch would wrap it in a worker's traceback."""
        samples, pixels, num_skipped = [], [], 0
        for document, sample in zip(work.documents, self._reader.read(work.documents), strict=True):
            try:
                kept = _cut(document, sample)
                pixels += [self._image(document, image) for image in kept.images]
            except LoadError as error:
                if self._on_error == "raise":
                    return error
                num_skipped += 1
            else:
                samples.append(kept)
        images = self._batch(pixels) if self._decode_images else tuple(pixels)
        return lay_out(samples, images, im_start=self._im_start, filler=0, num_skipped=num_skipped)

    def _image(self, document: Document, data: bytes) -> Any:
        if not self._decode_images:
            return data
        from omnidata.images import decode_rgb, resize_rgb

        try:
            return resize_rgb(decode_rgb(data), self._image_size, self._image_size)
        except RejectError as error:
            place = document.place
            raise LoadError(
                f"cannot decode an image of {place.key} in {place.shard}: {error.detail}"
            ) from error

    def _batch(self, pixels: list[np.ndarray]) -> Any:
        """uint8 [N, 3, S, S], in channels-last memory: no transposition on the CPU."""
        import torch

        size = self._image_size
        batch = torch.empty(len(pixels), size, size, 3, dtype=torch.uint8)
        for row, rgb in zip(batch.numpy(), pixels, strict=True):
            row[:] = rgb
        return batch.permute(0, 3, 1, 2)


def _cut(document: Document, sample: Sample | LoadError) -> Sample:
    """The sample as the plan keeps it, checked against the plan."""
    if isinstance(sample, LoadError):
        raise sample
    kept = replace(
        sample,
        input_ids=sample.input_ids[: document.num_tokens],
        labels=sample.labels[: document.num_tokens],
        images=sample.images[: document.num_images],
    )
    found = len(kept.input_ids), int((kept.labels[1:] != IGNORE_INDEX).sum()), len(kept.images)
    planned = document.num_tokens, document.num_supervised, document.num_images
    if found != planned:
        raise LoadError(
            f"sample {sample.key} of {document.place.shard} has {found} (tokens, supervised, images) where "
            f"the index says {planned}: the dataset is damaged, run `omnidata verify`"
        )
    return kept
