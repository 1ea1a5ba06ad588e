"""Tokenizers that behave tomorrow as they do today.

A tokenizer is used in three places (build, training, generation) and a single different id between them
spoils a model without an error. So there is one way to load one, and one number that names what it *does*::

    load_tokenizer(path_or_id)     a folder with tokenizer.json, or a Hub id -> transformers tokenizer
    fingerprint(tokenizer)         hash of the ids of a fixed probe text: behaviour, not files
    special_token_ids(tokenizer)   {"bos": 1, "eos": 2, ..., "<im_patch>": 32000, ...}
    prepare_tokenizer(source, out) a tokenizer with the image and grounding tokens and a chat template
                                   (a sentencepiece ``.model`` is converted first: sentencepiece_bpe.py)

``tokenizer.json`` is the truth. transformers would rebuild a Llama tokenizer's pre-tokenizer from a key,
``legacy``, that its own ``save_pretrained`` drops, and every ``▁`` after a special token would go; so every
tokenizer is loaded as the generic ``TokenizersBackend``, and what was loaded is compared with the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, SLICE_TOKENS, UserError

# Blanks, line ends, digits, scripts, bytes outside the vocabulary, code: where tokenizers differ.
PROBE = (
    "Hello world  two   three    four \n\n\tTab\r\nline 0123456789 3.14 — naïve Café ﬁ "
    "图像描述:一只猫。日本語 한국어 العربية हिन्दी 👩‍👩‍👧 \u2028 \xa0 "
    "def f(x):\n        return {'a': [1, 2]}\n"
    "<|user|>\nHi<|assistant|>\n[INST] x [/INST]  trailing  "
)


def load_tokenizer(path_or_id: str | Path) -> Any:
    """Load a tokenizer exactly as its tokenizer.json describes it, whatever class its config names."""
    name = str(path_or_id)
    if Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file():
        models = sorted(path.name for path in Path(name).glob("*.model"))
        hint = (
            f"run: omnidata prepare-tokenizer {Path(name) / models[0]} --out DIR"
            if models
            else "save one there"
        )
        raise UserError(f"tokenizer {name}: the folder has no tokenizer.json; {hint}")
    if Path(name).is_file():
        raise UserError(f"tokenizer {name} is a file; first run: omnidata prepare-tokenizer {name} --out DIR")
    tokenizer = _from_pretrained(name)
    _check_against_file(tokenizer, Path(name) / "tokenizer.json")
    return tokenizer


def _from_pretrained(name: str) -> Any:
    from transformers import TokenizersBackend

    cached_only = not Path(name).is_dir() and _hub_is_unknown()
    try:
        return TokenizersBackend.from_pretrained(name, local_files_only=cached_only)
    except (
        OSError,
        ValueError,
        KeyError,
    ) as error:  # what transformers raises for unknown names and bad files
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"tokenizer {name}: no folder with tokenizer.json, nor a Hub id in reach ({first_line})"
        ) from error


def _hub_is_unknown() -> bool:
    """Whether the Hub's name does not resolve: then huggingface_hub would try again for minutes."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False  # the proxy may know it
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def _check_against_file(tokenizer: Any, file: Path) -> None:
    """Refuse a tokenizer whose configuration made it differ from its own tokenizer.json."""
    if not file.is_file():
        return  # a Hub id: the file lies somewhere in the cache
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    text = PROBE + f"\n {tokenizer.eos_token or ''}\n {tokenizer.eos_token or ''} x"
    raw_ids = raw.encode(text, add_special_tokens=False).ids
    if raw_ids != tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
        raise UserError(
            f"tokenizer {file.parent}: tokenizer_config.json changes what tokenizer.json computes; "
            'set "tokenizer_class": "TokenizersBackend" there and remove "add_prefix_space" and "legacy"'
        )


def fingerprint(tokenizer: Any) -> str:
    """Hex hash of the tokenizer's behaviour: ids of a fixed probe, special ids, vocabulary size.

    Two tokenizers with the same fingerprint give the same ids for the probe with each special token in
    front of blanks, line ends and letters, which is where saving and loading again has been seen to differ.
    """
    specials = sorted(_named_tokens(tokenizer).values())
    texts = [PROBE, *(f"a {token}\n b{token} c {token}  {token}d" for token in specials)]
    backend = tokenizer.backend_tokenizer
    behaviour = [
        [backend.encode(text, add_special_tokens=flag).ids for text in texts for flag in (False, True)],
        sorted(special_token_ids(tokenizer).items()),
        len(tokenizer),
    ]
    return hashlib.blake2b(json.dumps(behaviour).encode(), digest_size=16).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the chat template's text ("" where there is none)."""
    return hashlib.sha256(template_text(tokenizer).encode()).hexdigest()


def template_text(tokenizer: Any) -> str:
    """The chat template that apply_chat_template takes by default ("" where there is none)."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates
        template = template.get("default")
    return template or ""


def special_token_ids(tokenizer: Any, more: Sequence[str] = ()) -> dict[str, int]:
    """Ids of the special tokens that the tokenizer has: bos, eos, pad, unk, image, grounding, slice tokens.

    ``more`` names others to include where it has them.
    """
    named = _named_tokens(tokenizer)
    named |= {token: token for token in more if token in tokenizer.added_tokens_encoder}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}


def _named_tokens(tokenizer: Any) -> dict[str, str]:
    roles = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    present = tokenizer.added_tokens_encoder
    ours = {token: token for token in IMAGE_TOKENS + CONTENT_TOKENS + SLICE_TOKENS if token in present}
    return {name: token for name, token in roles.items() if token is not None} | ours


def prepare_tokenizer(
    source: str | Path,
    out: str | Path,
    *,
    chat_template: str | None = None,
    slice_tokens: Sequence[str] = (),
) -> Any:
    """Write to folder ``out`` a tokenizer that OmniLMM can train with, and return it as loaded from there.

    ``source`` is an HF tokenizer (folder or id) or a sentencepiece BPE ``.model``. Each of IMAGE_TOKENS and
    CONTENT_TOKENS is added once, as a special token; after them ``slice_tokens``, which a build with
    --max-slices needs. ``chat_template``: None for Zephyr's (what OmniLMM
    trains on), "keep" for the source's own, a path of a Jinja file, or the template itself.
    """
    from omnidata.text.sentencepiece_bpe import tokenizer_from_model

    is_model = Path(source).is_file()
    tokenizer = tokenizer_from_model(Path(source)) if is_model else load_tokenizer(source)
    tokenizer.chat_template = _resolve_template(chat_template, tokenizer, source=source)
    _add_tokens(tokenizer, (*IMAGE_TOKENS, *CONTENT_TOKENS, *slice_tokens))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.save_pretrained(str(out))
    loaded = load_tokenizer(out)
    if fingerprint(loaded) != fingerprint(tokenizer):
        raise UserError(f"tokenizer {source} does not survive being saved and loaded; do not train with it")
    return loaded


def _add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    present = tokenizer.added_tokens_encoder
    missing = [token for token in tokens if token not in present]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _resolve_template(choice: str | None, tokenizer: Any, *, source: str | Path) -> str:
    from omnidata.text.chat_template import ZEPHYR

    if choice is None:
        return ZEPHYR
    if choice == "keep":
        if not template_text(tokenizer):
            raise UserError(f"tokenizer {source} has no chat template to keep; name a Jinja file instead")
        return template_text(tokenizer)
    if "{%" in choice or "{{" in choice:
        return choice
    if not Path(choice).is_file():
        raise UserError(f"chat template {choice}: no such file; give a Jinja file, a template, or keep")
    return Path(choice).read_text(encoding="utf-8")
