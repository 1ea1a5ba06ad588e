"""Tokenizers and chat templates for tests: the real Mistral one, a byte-level one trained in a blink, and the
shapes of the templates that are about.
"""

from __future__ import annotations

import json
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, Conversation, ImagePart, ImageRef, Message, TextPart
from omnidata.text.chat_template import ZEPHYR

GOLDEN = Path(__file__).parent / "golden"

# fmt: off
# ruff: noqa: E501
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}\
{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('turns must alternate, a user first') }}\
{%- endif %}{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}\
{{- '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}\
{%- endif %}{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"""

GENERATION = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Looks at contents (so every record is printed), but leaves them alone where they hold no thoughts.
THINKING = """{% for message in messages %}{% set content = message.content %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"""

TEMPLATES = {
    "zephyr": ZEPHYR, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "generation": GENERATION, "thinking": THINKING,
}  # fmt: skip
MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
)


@lru_cache(maxsize=1)
def golden_tokenizer_folder() -> str:
    """The original's tokenizer as a folder (unpacked once a test run)."""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in (GOLDEN / "tokenizer").iterdir():
        target = Path(folder) / file.name.removesuffix(".xz")
        target.write_bytes(lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes())
    return folder


@lru_cache(maxsize=1)
def golden_cases() -> tuple[dict[str, Any], ...]:
    """Inputs and outputs of the original's preprocessing."""
    return tuple(json.loads((GOLDEN / "preprocess" / "cases.json").read_text(encoding="utf-8")))


def mistral_model() -> Path:
    """The real sentencepiece model of Mistral 7B v0.1."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def sentencepiece_tokenizer(template: str = "zephyr") -> Any:
    """The original's tokenizer with another template."""
    from omnidata.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(golden_tokenizer_folder())
    tokenizer.chat_template = TEMPLATES[template]
    if template != "zephyr":
        _add(tokenizer, [marker for marker in MARKERS if "INST" not in marker])
    return tokenizer


def byte_level_tokenizer(template: str) -> Any:
    """A small byte-level BPE, as Llama-3 and Qwen have, with markers, image and content tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import TokenizersBackend

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["What is in the picture? A red square, two cats and the hello world\n\n\n\n\n"] * 9, trainer
    )
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    _add(tokenizer, [*MARKERS, *IMAGE_TOKENS, *CONTENT_TOKENS])
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def _add(tokenizer: Any, tokens: list[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def conversation(*texts: str, system: str | None = None, first: str = "user") -> Conversation:
    """Turns that alternate; ``<image>`` in a text is an image."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    turns = [("system", system)] if system is not None else []
    turns += [(roles[i % 2], text) for i, text in enumerate(texts)]
    messages, count = [], 0
    for role, text in turns:
        parts = []
        for i, piece in enumerate(text.split("<image>")):
            if i:
                parts.append(ImagePart(count))
                count += 1
            if piece:
                parts.append(TextPart(piece))
        messages.append(Message(role, tuple(parts)))
    return Conversation("x", tuple(messages), tuple(ImageRef(path=f"{i}.jpg") for i in range(count)))
