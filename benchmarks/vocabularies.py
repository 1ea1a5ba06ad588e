"""The real tokenizers that benchmarks build with: Mistral's (sentencepiece's BPE) and Qwen's (byte-level).

Packages carry their vocabularies (mistral-common, dashscope), so that no network is needed. Both are prepared
as ``omnidata prepare-tokenizer`` does it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

NAMES = ("Mistral", "Qwen")


def prepared(name: str, folder: str | Path) -> Any:
    """Write the tokenizer of that name to a folder; return it as loaded from there."""
    from omnidata.text.preparation import prepare_tokenizer

    if name == "Mistral":
        import mistral_common

        model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        return prepare_tokenizer(model, folder, chat_template="zephyr")
    import processors
    from throwaway import CHATML

    with TemporaryDirectory() as source:
        processors.tokenizer(processors.CHATML, {}, real=True).save_pretrained(source)
        return prepare_tokenizer(source, folder, chat_template=CHATML)


def tokenizer(name: str) -> Any:
    """The same, whose folder is gone."""
    with TemporaryDirectory() as folder:
        return prepared(name, folder)
