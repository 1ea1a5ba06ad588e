"""A recipe: everything that configures a run, as one strict tree of dataclasses.

    recipes/tiny_cpu.yaml ──load──▶ Recipe ──save──▶ RUN/recipe.yaml (resolved, also inside every checkpoint)
             ▲
    optim.lr=3e-4 run.dir=runs/second     dotted overrides from the command line, parsed as YAML

A key that no dataclass below has is an error, and so is a value of the wrong type; all errors of a recipe
come in one message. Sections stand in the order in which train.py uses them.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from omnidata.loader.augment import Augment
from omnidata.loader.remote import Remote
from omnidata.schema import UserError
from omnidata.where import Where


def at_least(least: float, default: Any) -> Any:
    """A field whose value, if it has one, may not be smaller."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and on what the run happens."""

    dir: str  # metrics.jsonl, tensorboard/, checkpoints/, final/ go here
    seed: int = 0  # weights, data order and dropout
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute; master weights are always float32
    deterministic: bool = False  # bit-exact on a GPU too, and slower; a CPU is bit-exact without
    threads: int | None = at_least(1, None)  # CPU threads of torch; null: torch's own choice
    resume: bool = True  # go on from the newest verified checkpoint of `dir`
    stop_after: int | None = at_least(1, None)  # pause after this step: save, exit 0; same schedule


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A weight for a part of the run."""

    weight: float  # as a dataset's
    until: float | None = None  # epochs since the run began; null: to the end


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One built dataset."""

    path: str  # folder or fsspec URL made by `omnidata build-shards`
    split: str = "train"
    where: str | None = None  # only samples that meet it: relevance_min >= 4 and source != "ocr.json"
    weight: float | None = None  # share of the samples, relative to the other weights; null: by size, or
    epochs: float | None = None  # passes in one epoch of the whole list; null: 1, unless there are weights
    weights: list[PhaseConfig] | None = None  # instead of weight: [{until: 0.5, weight: 3}, {weight: 1}]
    exclude: str | None = None  # a file of keys to leave out, one per line
    cap: int | None = None  # samples of one pass, others in the next …
    cap_by: str | None = None  # … of each value of this column of the index
    order: str = "shuffled"  # or length, or a numeric column of the index: rising; -length: falling


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes microbatches and steps."""

    train: list[DatasetConfig]
    val: list[DatasetConfig] = field(default_factory=list)
    max_tokens: int = at_least(1, 4096)  # tokens of a pack = of a microbatch
    max_images: int | None = at_least(0, None)  # images of a pack; null: only max_tokens limits it
    tail: Literal["pad", "drop"] = "pad"  # an epoch's last packs, too few for a step: a smaller step, or none
    oversize: Literal["refuse", "cut", "leave_out"] = "refuse"  # what to do with samples that fit no pack
    global_batch: int = at_least(1, 8)  # packs of a step over all ranks; each takes its share
    num_workers: int = at_least(0, 1)  # of the loader, a rank
    worker_timeout: float = at_least(1, 300.0)  # seconds until a silent worker is named and replaced
    on_error: Literal["raise", "skip"] = "raise"  # an unreadable sample: stop, or leave it out and count it
    checksum: bool = True  # hash what is read from a local disk, too; remote reads are always hashed
    remote: Remote = field(default_factory=Remote)  # datasets at a URL: concurrency, attempts, cache_dir, …
    augment: Augment | None = None  # training images only: crop, rotation, brightness, contrast, …


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (extra: peft) instead of training the matrices themselves."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["language_model"])  # vision_tower language_model
    # of the language model's blocks; null: every matrix (nn.Linear), as of the tower's
    target_modules: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights to start from and which of them learn."""

    path: str | None = None  # folder of save_pretrained or of the original checkpoint
    # or random weights: OmniLMMConfig fields, or changes to the config.json that a processor's dataset keeps
    config: dict[str, Any] | None = None
    freeze: list[str] = field(
        default_factory=list
    )  # vision_tower, connector (OmniLMM: resampler), language_model, embeddings, lm_head
    train_only_new_tokens: bool = False  # of embeddings and lm_head, update the special tokens' rows only
    lora: LoraConfig | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile of each transformer block


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = at_least(0, 1e-4)  # peak
    component_lr: dict[str, float] = field(default_factory=dict)  # peak by component, else `lr`
    weight_decay: float = at_least(0, 0.0)  # on matrices; never on embeddings, norms and biases
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm
    ema: float | None = None  # decay of the weights' running mean, e.g. 0.999; null: none is kept
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = at_least(0, 0)
    decay_steps: int = 0  # wsd: length of the final linear decay
    min_lr: float = at_least(0, 0.0)  # end of the schedule, as a fraction of the peak
    steps: int | None = at_least(1, None)  # exactly one of steps and epochs
    epochs: int | None = at_least(1, None)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How torchrun's ranks share the work."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = (
        "auto"  # auto: single, or fsdp under torchrun; single computes bfloat16 as fsdp over one rank does
    )
    shard_size: int | None = at_least(1, None)  # hsdp: ranks that share one copy, usually a node's
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # gradients on the wire (fsdp, hsdp)
    reshard_after_forward: bool = True  # fsdp: false keeps gathered weights until the backward pass
    sync_every_microbatch: bool = False  # true: less memory, more traffic under accumulation


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives."""

    every: int = at_least(0, 500)  # steps; 0: only at the end and on a signal
    keep_last: int = at_least(1, 2)  # besides the best one
    asynchronous: bool = True  # write behind the training


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Looking at the validation data while training."""

    every: int = at_least(0, 500)  # steps; 0: only at the end
    num_batches: int = at_least(0, 32)  # packs of validation loss; 0: none
    num_questions: int = at_least(0, 0)  # answers generated and compared exactly; 0: none
    keep_best: bool = True  # keep the checkpoint of the lowest validation loss


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told, and where."""

    every: int = at_least(1, 10)  # steps between progress lines; metrics.jsonl has every step
    by: str | None = None  # also loss, tokens and samples of each: source, dataset or a column of the index
    tensorboard: bool = True
    tracker: Literal["none", "wandb", "trackio"] = "none"
    project: str = "omnilmm"  # of the tracker
    plot: bool = True  # loss.svg at the end
    profile_steps: int = at_least(0, 0)  # torch profiler trace of this many steps, after three


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When to stop rather than go on."""

    max_nonfinite: int = at_least(1, 5)  # steps in a row with a non-finite gradient
    spike_factor: float = 2.0  # warn when the loss is this many times its running mean; 0: never
    first_step_timeout: float = 1800.0  # seconds; compilation and first collectives are slow
    evaluation_timeout: float = 3600.0  # of one evaluation, save or export
    step_timeout: float = 600.0  # seconds without a finished step until the rank dumps its stacks and exits
    plan_memory: bool = False  # before the start, trace a microbatch and refuse what will not fit; seconds


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``dotted.key=value`` overrides; every mistake in one UserError."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; see pipelines/recipes/ for examples") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping of sections, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree, name=str(path))


def parse_recipe(tree: dict[str, Any], *, name: str = "recipe") -> Recipe:
    """``{"run": {...}, ...}`` -> Recipe."""
    problems: list[str] = []
    recipe = _build(Recipe, tree, "", problems)
    if not problems:
        problems = list(_contradictions(recipe))
    if problems:
        raise UserError(f"{name}:\n  " + "\n  ".join(problems))
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data; ``parse_recipe(to_dict(r)) == r``."""
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as it is saved with the run and with every checkpoint."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _contradictions(recipe: Recipe) -> typing.Iterator[str]:
    """What each value alone cannot show."""
    model, optim, parallel = recipe.model, recipe.optim, recipe.parallel
    for section in dataclasses.fields(recipe):
        settings = getattr(recipe, section.name)
        for key in dataclasses.fields(settings):
            least, value = key.metadata.get("least"), getattr(settings, key.name)
            if least is not None and value is not None and value < least:
                yield f"{section.name}.{key.name}: at least {least} is needed, not {value}"
    if optim.clip <= 0:
        yield f"optim.clip: a positive norm is needed, not {optim.clip}; a huge one clips nothing"
    if optim.ema is not None and not 0 < optim.ema < 1:
        yield f"optim.ema: a decay between 0 and 1 is needed, not {optim.ema}; null keeps no running mean"
    if (model.path is None) == (model.config is None):
        yield "model: give exactly one of path (start from weights) and config (random weights)"
    if (optim.steps is None) == (optim.epochs is None):
        yield "optim: give exactly one of steps and epochs"
    if not recipe.data.train:
        yield "data.train: at least one dataset is needed"
    yield from _bad_conditions(recipe.data)
    if len(optim.betas) != 2:
        yield f"optim.betas: two numbers are needed, not {optim.betas}"
    if optim.schedule == "wsd" and optim.decay_steps <= 0:
        yield "optim.decay_steps: the wsd schedule needs the length of its final decay"
    if (parallel.strategy == "hsdp") != (parallel.shard_size is not None):
        yield "parallel.shard_size: goes with strategy hsdp, and only with it"
    unknown = set(model.freeze) | set(optim.component_lr)
    unknown -= {"vision_tower", "resampler", "connector", "language_model", "embeddings", "lm_head"}
    if unknown:
        yield (
            f"model.freeze / optim.component_lr: unknown component {sorted(unknown)}; there are "
            "vision_tower, resampler (OmniLMM) or connector (others), language_model, embeddings, lm_head"
        )
    if model.train_only_new_tokens and {"embeddings", "lm_head"} <= set(model.freeze):
        yield "model.train_only_new_tokens: embeddings and lm_head are both frozen"


def _bad_conditions(data: DataConfig) -> typing.Iterator[str]:
    """``where`` that is no condition; whether the dataset has its columns shows when that is opened."""
    for name in ("train", "val"):
        for number, dataset in enumerate(getattr(data, name)):
            try:
                dataset.where and Where(dataset.where)
            except UserError as error:
                yield f"data.{name}.{number}.{error}"


def _override(tree: dict[str, Any], override: str) -> None:
    """``optim.lr=1e-3`` sets tree["optim"]["lr"]; list items are numbers: ``data.train.0.path=x``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like section.key=value, e.g. optim.lr=1e-4")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
            continue
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} is no place inside the recipe")
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
    value = yaml.safe_load(text)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {last!r} is no place inside the recipe")


def _build(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Turn plain YAML data into ``kind``; add a line to ``problems`` for everything that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):  # X | None is the only union that recipes use
        return None if value is None else _build(arguments[0], value, where, problems)
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, where, problems)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{where}.{i}", problems) for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {
            str(key): _build(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()
        }
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 (no dot) as a string
        except (TypeError, ValueError):
            pass
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    expected = " | ".join(map(repr, arguments)) if origin is Literal else str(getattr(kind, "__name__", kind))
    problems.append(f"{where}: expected {expected}, got {value!r}")
    return None


def _build_section(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """One dataclass: unknown keys and missing required keys are problems."""
    if not isinstance(value, dict):
        problems.append(f"{where or 'recipe'}: expected a mapping, got {value!r}")
        return None
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(hints)}"
            problems.append(f"{dot}{key}: unknown key{hint}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, spec in fields.items():
        if name not in value and (spec.default, spec.default_factory) == required:
            problems.append(f"{dot}{name}: required")
    values = {k: _build(hints[k], v, f"{dot}{k}", problems) for k, v in value.items() if k in hints}
    return None if problems else kind(**values)
