"""``omnidata plan``: what an epoch will be, before any GPU is rented. Everything comes from the index.

    plan windows        ─▶ per pack: samples, tokens, supervised, images     (a million samples in seconds)
    taken by steps of G ─▶ per step: the loss denominator, tokens, images
    dealt to W ranks    ─▶ balance, and the share of time in which ranks wait for the slowest
    all documents       ─▶ FLOPs and hours (omnidata.plan.cost, its assumptions beside them)

The fields of Forecast are the keys of ``omnidata plan --json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from omnidata.index import numbers
from omnidata.plan.catalog import IMAGE_PIXELS, IndexCatalog
from omnidata.plan.cost import CHANNELS, Assumptions, Cost, epoch_cost, token_weights
from omnidata.plan.epoch import EpochPlan
from omnidata.plan.steps import deal
from omnidata.plan.window import Window
from omnidata.schema import UserError


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over packs or steps; all 0 if there are none."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class Balance:
    """How even the ranks' shares of a step are: the largest share / the mean share, averaged over steps."""

    tokens: float  # 1.0 is perfect
    images: float
    cost: float  # tokens + image_cost × images + attention_cost × squared lengths: what the plan evens out
    idle: float  # share of all ranks' time spent waiting for the costliest rank, 0 to 1


@dataclass(frozen=True, slots=True)
class Forecast:
    """One epoch, foreseen."""

    datasets: tuple[str, ...]
    where: tuple[str | None, ...]  # of each dataset, the condition that its samples meet
    samples_of: tuple[int, ...]  # of each dataset, its samples in this epoch
    seed: int
    epoch: int
    max_tokens: int  # a pack
    max_images: int | None  # a pack; null: no limit
    global_batch: int  # packs per step
    world_size: int  # ranks
    num_samples: int
    num_packs: int
    num_steps: int
    num_packs_dropped: int  # after the last whole step: a step of fewer, or left out (data.tail)
    num_tokens: int
    num_supervised: int
    num_images: int
    num_cut: int  # samples too large for a pack, cut after a reply
    num_left_out: int  # samples too large for a pack, left out
    padding_packed: float  # share of positions that hold no token, with this plan
    padding_unpacked: float  # with batches of unpacked_batch samples, each padded to its longest
    unpacked_batch: int  # as many samples as a pack holds on average
    samples_per_pack: Spread
    tokens_per_pack: Spread
    images_per_pack: Spread
    tokens_per_step: Spread
    supervised_per_step: Spread  # the loss denominator
    images_per_step: Spread
    image_cost: float  # tokens that an image weighs when packs are dealt to ranks, of the model below
    attention_cost: float  # tokens that a document's squared length weighs
    balance: Balance
    cost: Cost

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def forecast(
    plan: EpochPlan,
    *,
    world_size: int = 1,
    global_batch: int | None = None,
    assume: Assumptions | None = None,
) -> Forecast:
    """Foresee the epoch of ``plan``; ``global_batch`` is one pack a rank unless given."""
    global_batch, assume = global_batch or world_size, assume or Assumptions()
    image_cost, attention_cost = token_weights(assume, image_size=_image_size(plan))
    windows = list(plan.windows())
    packs = pack_table(windows)
    num_packs, num_tokens = len(packs["tokens"]), int(packs["tokens"].sum())
    num_samples = int(packs["samples"].sum())
    if not num_packs:
        raise UserError(_nothing_fits(plan))
    lengths = np.concatenate([window.lengths.tokens for window in windows])
    num_steps = num_packs // global_batch
    order = _order_of_steps(plan, windows, global_batch)[: num_steps * global_batch]
    steps = {name: column[order].reshape(num_steps, global_batch) for name, column in packs.items()}
    costs = (
        steps["tokens"] + image_cost * (steps["pixels"] / IMAGE_PIXELS) + attention_cost * steps["squares"]
    )
    unpacked_batch = max(1, round(num_samples / max(1, num_packs)))
    num_images = int(packs["images"].sum())
    return Forecast(
        datasets=tuple(source.catalog.name for source in plan.sources),
        where=tuple(_where(source.index) for source in plan.sources),
        samples_of=_samples_of(windows, len(plan.sources)),
        seed=plan.seed,
        epoch=plan.epoch,
        max_tokens=plan.max_tokens,
        max_images=plan.max_images,
        global_batch=global_batch,
        world_size=world_size,
        num_samples=num_samples,
        num_packs=num_packs,
        num_steps=num_steps,
        num_packs_dropped=num_packs - num_steps * global_batch,
        num_tokens=num_tokens,
        num_supervised=int(packs["supervised"].sum()),
        num_images=num_images,
        num_cut=sum(window.num_cut for window in windows),
        num_left_out=sum(window.num_left_out for window in windows),
        padding_packed=1 - num_tokens / max(1, num_packs * plan.max_tokens),
        padding_unpacked=padding(lengths, unpacked_batch),
        unpacked_batch=unpacked_batch,
        samples_per_pack=spread(packs["samples"]),
        tokens_per_pack=spread(packs["tokens"]),
        images_per_pack=spread(packs["images"]),
        tokens_per_step=spread(steps["tokens"].sum(axis=1)),
        supervised_per_step=spread(steps["supervised"].sum(axis=1)),
        images_per_step=spread(steps["images"].sum(axis=1)),
        image_cost=image_cost,
        attention_cost=attention_cost,
        balance=rank_balance(steps["tokens"], steps["images"], costs, world_size),
        cost=epoch_cost(lengths, pixels=_pixels(plan, windows), assume=assume),
    )


def _image_size(plan: EpochPlan) -> int:
    """Pixels per side of the picture that ``Pack.image_load`` counts as one."""
    manifest = plan.sources[0].index.dataset.manifest
    return manifest.image_size if manifest.is_omnilmm else 448


def _order_of_steps(plan: EpochPlan, windows: list[Window], global_batch: int) -> np.ndarray:
    """All packs' positions in ``pack_table``, as the steps take them."""
    firsts = np.cumsum([0, *map(len, windows)])
    taken = plan.runs(global_batch, windows=windows)
    return np.concatenate([firsts[run.window.number] + run.order for run in taken])


def _samples_of(windows: Iterable[Window], num_datasets: int) -> tuple[int, ...]:
    counts = sum(np.bincount(window.dataset, minlength=num_datasets) for window in windows)
    return tuple(np.asarray(counts).tolist())


def _where(catalog: IndexCatalog) -> str | None:
    where = catalog.dataset.where
    return str(where) if where else None


def _nothing_fits(plan: EpochPlan) -> str:
    datasets = [source.index.dataset for source in plan.sources]
    shortest = min(
        min(numbers(dataset.index_columns(["n_tokens"]), "n_tokens"), default=0) for dataset in datasets
    )
    images = "" if plan.max_images is None else f" and {plan.max_images} images"
    return (
        f"no sample of {', '.join(dataset.path for dataset in datasets)} fits a pack of {plan.max_tokens} "
        f"tokens{images}; the shortest has {shortest} tokens: raise max_tokens"
        + ("" if plan.max_images is None else " or max_images")
    )


COLUMNS = ("tokens", "supervised", "images", "pixels")


def _pixels(plan: EpochPlan, windows: list[Window]) -> np.ndarray:
    """Values of each image's pixel tensors, as far as the plan knows: a sample's are taken as alike."""
    manifests = [source.index.dataset.manifest for source in plan.sources]
    images = np.concatenate([window.lengths.images for window in windows])
    pixels = np.concatenate([window.lengths.pixels for window in windows])
    owners = np.concatenate([window.dataset for window in windows])
    for number, manifest in enumerate(manifests):
        if manifest.is_omnilmm:
            pixels[owners == number] = images[owners == number] * CHANNELS * manifest.image_size**2
    return np.repeat(pixels / np.maximum(images, 1), images)


def pack_table(windows: Iterable[Window]) -> dict[str, np.ndarray]:
    """Samples, tokens, supervised tokens, images, pixels and squared lengths of every pack, int64."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("samples", "squares", *COLUMNS)}
    for window in windows:
        columns["samples"].append(np.diff(window.starts))
        columns["squares"].append(window.sums(np.square(window.lengths.tokens)))
        for name in COLUMNS:
            columns[name].append(window.sums(getattr(window.lengths, name)))
    return {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}


def spread(values: np.ndarray) -> Spread:
    """Smallest, median, largest."""
    if len(values) == 0:
        return Spread(0, 0, 0)
    return Spread(values.min().item(), float(np.median(values)), values.max().item())


def padding(lengths: np.ndarray, batch: int) -> float:
    """Share of padding when batches of ``batch`` samples are padded to their longest: [2, 4], 2 -> 0.25."""
    if len(lengths) == 0:
        return 0.0
    filled = np.append(lengths, np.zeros(-len(lengths) % batch, np.int64)).reshape(-1, batch)
    rows = np.minimum(batch, len(lengths) - batch * np.arange(len(filled)))  # the last may be smaller
    return float(1 - lengths.sum() / (filled.max(axis=1) * rows).sum())


def rank_balance(tokens: np.ndarray, images: np.ndarray, costs: np.ndarray, world_size: int) -> Balance:
    """How ``steps.deal`` splits steps; arrays ``[steps, packs]``."""
    if world_size == 1 or len(tokens) == 0:
        return Balance(1.0, 1.0, 1.0, 0.0)
    loads = np.zeros((3, len(tokens), world_size))
    if costs.shape[1] <= world_size:  # at most one pack a rank: whose is no matter
        loads[:, :, : costs.shape[1]] = tokens, images, costs
        costs = costs[:0]
    for step, cost in enumerate(costs):
        for rank, mine in enumerate(deal(cost, world_size)):
            loads[:, step, rank] = tokens[step][mine].sum(), images[step][mine].sum(), cost[mine].sum()
    top, mean = loads.max(axis=2), loads.mean(axis=2)
    ratios = np.where(mean > 0, top / np.maximum(mean, 1e-9), 1.0).mean(axis=1)
    idle = 1 - mean[2].sum() / top[2].sum()
    of_tokens, of_images, of_cost = ratios.tolist()
    return Balance(of_tokens, of_images, of_cost, float(idle))
