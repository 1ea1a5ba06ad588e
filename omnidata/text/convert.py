"""A tokenizer from whatever files its authors gave: for ``prepare-tokenizer``, which writes tokenizer.json.

tokenizer.json             as transformers loads its folder, configuration included
tokenizer.model, .model.v3 sentencepiece BPE                          sentencepiece_bpe.py
tekken.json                Mistral's; transformers converts it
vocab.json + merges.txt …  what else a folder holds that transformers converts
*.tiktoken                 refused: it holds neither the pattern that cuts texts nor the special tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnidata.schema import UserError
from omnidata.text.sentencepiece_bpe import tokenizer_from_model
from omnidata.text.tokenizer import from_pretrained
from omnidata.text.vocabulary_files import vocabulary_of


def converted(source: str | Path) -> Any:
    """The transformers tokenizer of a folder, a Hub id or a file.

    Raises:
        UserError: nothing there can be converted; names the file that is needed.
    """
    path = Path(source)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        path = vocabulary_of(path) or path
    if path.is_file():
        return _from_file(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return _from_other_files(path)
    return from_pretrained(str(source))


def _from_file(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(4096).lstrip()
    if path.name == "tokenizer.json":
        return from_pretrained(str(path.parent))
    if path.suffix == ".tiktoken" or _is_ranks(start):
        raise UserError(
            f"tokenizer {path}: tiktoken ranks lack the pattern that cuts texts and the special tokens; "
            "give a folder with the model's tokenizer.json (of Qwen: that of its Hugging Face release)"
        )
    if start[:1] == b"{":
        return _from_tekken(path, start)
    return tokenizer_from_model(path)


def _is_ranks(start: bytes) -> bool:
    """Whether a file begins as tiktoken's do: ``IQ== 0``."""
    first = start.partition(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit()


def _from_tekken(path: Path, start: bytes) -> object:
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    if b'"pattern"' not in start and b'"default_vocab_size"' not in start:
        raise UserError(
            f"tokenizer {path}: JSON, but not Mistral's tekken.json; give a folder with tokenizer.json"
        )
    try:
        return convert_tekken_tokenizer(str(path))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"tokenizer {path}: transformers cannot convert it ({error})") from error


def _from_other_files(folder: Path) -> object:
    from transformers import AutoTokenizer

    try:
        # False, not left out: transformers would ask the terminal whether to run the folder's code.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"tokenizer {folder}: no tokenizer.json, and transformers converts nothing there ({first_line})"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {folder}: no tokenizer.json, and transformers cannot make one")
    return tokenizer
