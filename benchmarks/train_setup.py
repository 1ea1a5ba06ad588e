"""What benchmarks of training share: a tiny model and a billion, a corpus, a recipe, clocks."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers
from corpus import WORDS, make_photos, write_uneven_records

from omnidata.text.preparation import prepare_tokenizer
from pipelines.config import Recipe, parse_recipe

WARMUP_STEPS = 3
TOKENS_PER_WORD = 1.9  # of the corpus's WORDS by the tokenizer below, with the turns' headers
NUM_QUERY = 64
# In proportion: the frozen tower takes about a third of a sample's FLOPs, as in the 12B at 400 tokens.
TINY = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 8, "embed_dim": 192, "num_heads": 3, "patch_size": 14, "img_size": 224},
    "image_size": 224,
    "resampler_heads": 4,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BILLION = {  # 1.1 with its tower
    "mm_vision_tower": "vit_large_patch14_clip_224",
    "vision_kwargs": {"img_size": 448},
    "image_size": 448,
    "vocab_size": 32009,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Setup:
    """What trains, on what."""

    device: str
    dtype: str
    model: dict[str, Any]
    max_tokens: int  # of a pack
    packs: int  # a step
    workers: int


SETUPS = {
    "cpu": Setup("cpu", "float32", TINY, max_tokens=4096, packs=2, workers=1),
    "cuda": Setup("cuda", "bfloat16", BILLION, max_tokens=8192, packs=4, workers=14),
}


# --- the data ---------------------------------------------------------------------------------------------


def make_corpus(folder: Path, *, records: int, image_size: int, options: Sequence[str] = ()) -> None:
    """Photographs, LLaVA JSON lines and the dataset built from them."""
    photos = make_photos(folder / "photos", min(records, 200))
    write_uneven_records(folder / "records.jsonl", records, photos, tokens_per_word=TOKENS_PER_WORD)
    make_tokenizer(folder)
    command = (
        *(sys.executable, "-m", "omnidata.cli", "build-shards", str(folder / "records.jsonl"), "--quiet"),
        *("--out", str(folder / "data"), "--image-root", str(folder / "photos"), "--max-length", "2048"),
        *("--tokenizer", str(folder / "tokenizer"), "--num-query", str(NUM_QUERY)),
        *("--image-size", str(image_size), *options),
    )
    subprocess.run(command, check=True, stdout=sys.stderr)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of about a thousand words: a real one's vocabulary would dwarf this model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), " ".join(WORDS).title()], trainer)
    tokenizer = transformers.TokenizersBackend(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "plain")
    prepare_tokenizer(folder / "plain", folder / "tokenizer", chat_template="zephyr")


def recipe_of(folder: Path, name: str, setup: Setup, *, steps: int) -> Recipe:
    """Constant learning rate, no warm-up: the same in both loops."""
    return parse_recipe(
        {
            "run": {"dir": str(folder / name), "device": setup.device, "dtype": setup.dtype},
            "data": {
                "train": [{"path": str(folder / "data")}],
                "max_tokens": setup.max_tokens,
                "global_batch": setup.packs,
                "num_workers": setup.workers,
            },
            "model": {"config": setup.model, "freeze": ["vision_tower"]},
            "optim": {"lr": 1e-3, "schedule": "constant", "steps": steps},
            "checkpoint": {"every": 0},
            "log": {"every": 10**9, "tensorboard": False, "plot": False},
        }
    )


# --- time -------------------------------------------------------------------------------------------------


def rate(samples: list[int], ends: list[float]) -> dict[str, float]:
    """Samples a second of the steps between the warm-up and the last one, whose end nobody notes."""
    timed = samples[WARMUP_STEPS : len(samples) - 1]
    seconds = ends[len(samples) - 2] - ends[WARMUP_STEPS - 1]
    return {"samples_per_s": sum(timed) / seconds, "timed_steps": len(timed)}


class Clock:
    """CPU seconds of this process and of children that have ended."""

    def __enter__(self) -> Clock:
        self.cpu = -self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += self._now()

    @staticmethod
    def _now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)
