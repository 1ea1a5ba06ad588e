"""The profile of any processor of transformers: it is asked, without a pixel, what stands for a picture.

Given pictures on torch's *meta* device a processor computes sizes and nothing else, and says which text
replaces each image token::

    processor(images=[[(3, 480, 640) on meta]], text=["<|image_pad|>"], return_text_replacement_offsets=True)
      ->  replacement  "<|image_pad|>" × 300        pixel_values  [1200, 1536] on meta

One question per sample, because a run may depend on its neighbours (LLaVA-OneVision cuts a picture that is
alone, MiniCPM-V numbers them). Processors that look at values cannot run on meta; they are shown black
pictures of those sizes instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.profiles import PROCESSOR, Run, Size
from omnidata.profiles.shrinking import propose
from omnidata.schema import RejectError, UserError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

CACHED_SIZES = 1 << 15
# What a processor raises on shapes that it cannot take; on meta also what it raises on values it cannot see
# (NotImplementedError is a RuntimeError).
_REFUSALS = (ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError)
_MISTAKES = (TypeError, KeyError, AttributeError)  # of a processor that is called otherwise
ANSWER = "text_replacement_offsets"


class ProcessorProfile:
    """Answers by asking a processor.

    Args:
        processor: of transformers, with ``image_token``.
        arguments: passed with every call, as in ``{"max_pixels": 1003520}``.

    Raises:
        UserError: the processor does not know an argument, or cannot be asked for replacements.
    """

    def __init__(self, processor: ProcessorMixin, arguments: Mapping[str, Any] | None = None) -> None:
        self.processor = processor
        self.image_token: str = processor.image_token
        self.arguments = dict(arguments or {})
        self._check_arguments()
        self.arguments = _of_today(self.arguments, processor.image_processor)
        self.device = self._find_device()
        self.runs = lru_cache(maxsize=CACHED_SIZES)(self._runs)
        self.run_ids = lru_cache(maxsize=4096)(self._run_ids)
        self.smaller = lru_cache(maxsize=CACHED_SIZES)(self._smaller)

    # --- runs ---------------------------------------------------------------------------------------------

    def _runs(self, sizes: tuple[Size, ...]) -> tuple[Run, ...]:
        """The run of each of one sample's pictures.

        Raises:
            RejectError: ``image_shape``, in the processor's own words.
        """
        try:
            out = self._ask(sizes, self.device)
        except _REFUSALS as error:
            raise RejectError("image_shape", self._words(sizes, error)) from error
        replacements = out[ANSWER][0]
        if len(replacements) != len(sizes):
            raise RejectError(
                "image_shape", f"the processor writes {len(replacements)} runs for {len(sizes)} pictures"
            )
        texts = [item["replacement"] for item in replacements]
        pixels = _shares(_num_values(out), self._num_features([self.run_ids(text) for text in texts]))
        return tuple(
            Run(text, len(self.run_ids(text)), share) for text, share in zip(texts, pixels, strict=True)
        )

    def _words(self, sizes: tuple[Size, ...], error: Exception) -> str:
        """Why pictures of these sizes are refused."""
        if not isinstance(error, ValueError) and self.device == "meta":  # what a real picture would raise
            try:
                self._ask(sizes, "cpu")
            except _REFUSALS as real:
                error = real
        shown = ", ".join(f"{width}×{height}" for width, height in sizes[:4])
        return f"the model's processor refuses pictures of {shown}{'…' * (len(sizes) > 4)}: {error}"

    def _ask(self, sizes: tuple[Size, ...], device: str) -> Any:
        import torch

        pictures = [
            torch.zeros((3, height, width), dtype=torch.uint8, device=device) for width, height in sizes
        ]
        return self.processor(
            images=[pictures],  # nested: one sample's, as apply_chat_template gives them
            text=[self.image_token * len(sizes)],
            return_text_replacement_offsets=True,
            return_tensors="pt",
            input_data_format="channels_first",  # nobody guesses at a picture of 3 columns
            **self.arguments,
        )

    def _run_ids(self, text: str) -> np.ndarray:
        """Ids int32 of a run by itself."""
        return np.array(self.processor.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def core_ids(self, text: str) -> np.ndarray:
        """A run's ids from its first added token to its last: what no text beside it can change."""
        ids = self.run_ids(text)
        inner = np.flatnonzero(np.isin(ids, self._added_ids))
        return ids[inner[0] : inner[-1] + 1] if len(inner) else ids

    @cached_property
    def _added_ids(self) -> np.ndarray:
        return np.array(sorted(self.processor.tokenizer.added_tokens_decoder), dtype=np.int32)

    # --- what the ids mean ----------------------------------------------------------------------------------

    @cached_property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that are marked as a picture's (``mm_token_type_ids`` 1).

        Some processors write another token than their ``image_token`` where features go: the commonest of
        the tokenizer's added ones in a run, if it is clearly commoner than those that are named.
        """
        ids = getattr(self.processor, "image_token_ids", None) or []
        named = [int(token) for token in ids if token is not None]
        named = named or [int(self.processor.tokenizer.convert_tokens_to_ids(self.image_token))]
        run = self.run_ids(_texts(self._ask(((640, 480),), self.device))[0])
        found, counts = np.unique(run[np.isin(run, self._added_ids)], return_counts=True)
        if len(found) and counts.max() > 2 * np.isin(run, named).sum():
            named = [int(found[counts.argmax()])]
        return tuple(sorted(named))

    @cached_property
    def feature_id(self) -> int:
        """The id whose embedding the model replaces by a feature: of the image tokens the commonest."""
        return self._feature(self.run_ids(self.runs(((640, 480),))[0].text))

    def _num_features(self, runs: list[np.ndarray]) -> list[int]:
        """How often each run holds the token that features replace: of the image tokens the commonest."""
        feature = self._feature(np.concatenate(runs))
        return [int(np.count_nonzero(run == feature)) for run in runs]

    def _feature(self, ids: np.ndarray) -> int:
        found, counts = np.unique(ids[np.isin(ids, self.image_token_ids)], return_counts=True)
        return int(found[counts.argmax()]) if len(found) else -1

    # --- smaller pictures -----------------------------------------------------------------------------------

    def _smaller(self, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        """Sizes to store the pictures at, of equal runs and pixels; those given if none is proven."""
        before = self.runs(sizes)
        for proposed in propose(sizes, before):
            try:
                if self.runs(proposed) == before:
                    return proposed
            except RejectError:
                continue
        return sizes

    # --- at the start ---------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        known = _names_of_arguments(self.processor)
        if unknown := sorted(self.arguments.keys() - known):
            raise UserError(
                f"{type(self.processor).__name__} has no argument {', '.join(unknown)}; its pictures' "
                f"arguments are {', '.join(sorted(known))}"
            )

    def _find_device(self) -> str:
        """``meta`` where the processor runs without pixels, else ``cpu``: black pictures."""
        probe = ((64, 48), (48, 96))
        try:
            answer = _texts(self._ask(probe, "meta"))
        except (*_REFUSALS, *_MISTAKES):  # numpy() of a meta tensor is a TypeError in torch 2.11
            answer = None  # of pictures without values; or of these, as black ones will show
        try:
            seen = _texts(self._ask(probe, "cpu"))
        except (*_REFUSALS, *_MISTAKES) as error:
            raise UserError(self._unanswered(error)) from error
        return "meta" if answer == seen else "cpu"

    def _unanswered(self, error: Exception) -> str:
        words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if isinstance(error, KeyError) and error.args == (ANSWER,):
            words = "it does not say which text replaces an image token"
        return (
            f"{type(self.processor).__name__} cannot be asked what stands for a picture ({words}); "
            "check --processor-arg, and transformers' version"
        )

    # --- facts for the manifest -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, object]:
        """The manifest's ``profile``, less the fingerprint."""
        import transformers

        ids = [*self.image_token_ids]
        return {
            "name": PROCESSOR,
            "processor": type(self.processor).__name__,
            "arguments": self.arguments,
            "image_token": self.image_token,
            "image_token_ids": ids,
            "feature_id": self.feature_id,
            "image_processor": type(self.processor.image_processor).__name__,
            "configuration": _plain(self.processor.image_processor.to_dict()),
            "transformers": transformers.__version__,
            "runs_stand_alone": self._runs_stand_alone(),
        }

    def _runs_stand_alone(self) -> bool:
        """Are the first pictures' runs the same whatever pictures follow? Only then may a sample be cut."""
        sizes = ((640, 480), (300, 900), (64, 64))
        whole = self.runs(sizes)
        return all(self.runs(sizes[:number]) == whole[:number] for number in (1, 2))


def _of_today(arguments: dict[str, Any], image_processor: Any) -> dict[str, object]:
    """``min_pixels`` and ``max_pixels`` as today's transformers takes them: edges (areas) of ``size``."""
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    given = {edges[name]: value for name, value in arguments.items() if name in edges}
    size = dict(image_processor.size or {})
    if not given or not set(edges.values()) <= size.keys():
        return arguments
    rest = {name: value for name, value in arguments.items() if name not in edges}
    edge = {name: size[name] for name in edges.values()} | given
    return rest | {"size": edge | rest.get("size", {})}


def _texts(out: Any) -> list[str]:
    return [item["replacement"] for item in out[ANSWER][0]]


def _num_values(out: Any) -> int:
    """Values of the tensors that hold pixels: everything that is not small whole numbers about them."""
    return sum(value.numel() for name, value in out.items() if is_pixels(name, value))


def is_pixels(name: str, value: object) -> bool:
    """Whether an output of a processor holds pixels (``pixel_values``), not facts about them."""
    return name.startswith("pixel_values") and hasattr(value, "numel")


def _shares(total: int, counts: list[int]) -> list[int]:
    """``total`` dealt out in proportion to ``counts``, exactly."""
    if not counts or not sum(counts):
        return [total // max(len(counts), 1)] * len(counts)
    stops = np.cumsum(counts) * total // sum(counts)
    return np.diff(stops, prepend=0).tolist()


def _names_of_arguments(processor: ProcessorMixin) -> set[str]:
    """Arguments of a call that concern pictures: the processor's own and its image processor's."""
    names: set[str] = set()
    for owner in (processor, processor.image_processor):
        kinds = getattr(owner, "valid_processor_kwargs", None), getattr(owner, "valid_kwargs", None)
        for kind in kinds:
            annotations = getattr(kind, "__annotations__", {})
            if "images_kwargs" not in annotations:
                names |= set(_all_annotations(kind))
    names |= {name for name in vars(processor.image_processor) if not name.startswith("_")}
    return names - {"return_tensors", "device", "disable_grouping", "image_processor_type", "processor_class"}


def _all_annotations(kind: object) -> set[str]:
    names: set[str] = set()
    for base in getattr(kind, "__orig_bases__", ()) or ():
        names |= _all_annotations(base)
    return names | set(getattr(kind, "__annotations__", {}))


def _plain(value: object) -> object:
    """JSON of settings: tuples become lists, what is no JSON its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
