"""Tokenizers that behave tomorrow as they do today.

A tokenizer is used in three places (build, training, generation) and a single different id between them
spoils a model without an error. So there is one way to load one, and one number that names what it *does*::

    load_tokenizer(path_or_id)     a folder with tokenizer.json, or a Hub id -> transformers tokenizer
    fingerprint(tokenizer)         hash of the ids of a fixed probe text: behaviour, not files
    special_token_ids(tokenizer)   {"bos": 1, "eos": 2, ..., "<im_patch>": 32000, ...}
    prepare_tokenizer(source, out) a tokenizer with the image and grounding tokens and a chat template:
                                   preparation.py (other files than tokenizer.json: convert.py)

``tokenizer.json`` is the truth. transformers would rebuild a Llama tokenizer's pre-tokenizer from a key,
``legacy``, that its own ``save_pretrained`` drops, and every ``▁`` after a special token would go; so every
tokenizer is loaded as the generic ``TokenizersBackend``, and what was loaded is compared with the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, SLICE_TOKENS, UserError
from omnidata.text.vocabulary_files import how_to_convert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from omnidata.text.prepared import AnyTokenizer

# Blanks, line ends, digits, scripts, bytes outside the vocabulary, code: where tokenizers differ.
PROBE = (
    "Hello world  two   three    four \n\n\tTab\r\nline 0123456789 3.14 — naïve Café ﬁ "
    "图像描述:一只猫。日本語 한국어 العربية हिन्दी 👩‍👩‍👧 \u2028 \xa0 "
    "def f(x):\n        return {'a': [1, 2]}\n"
    "<|user|>\nHi<|assistant|>\n[INST] x [/INST]  trailing  "
)


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer exactly as its tokenizer.json describes it, whatever class its config names.

    Raises:
        UserError: there is none at ``path_or_id``, or its tokenizer_config.json changes what it computes.
    """
    name = str(path_or_id)
    if Path(name).is_file() or (Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file()):
        raise UserError(f"tokenizer {name}: {how_to_convert(Path(name))}")
    tokenizer = from_pretrained(name)
    check_against_file(tokenizer, Path(name) / "tokenizer.json")
    return tokenizer


def from_pretrained(name: str) -> PreTrainedTokenizerBase:
    """As transformers loads a folder with tokenizer.json or a Hub id; its configuration is not checked."""
    from transformers import TokenizersBackend

    is_folder = Path(name).is_dir()
    if not is_folder and not _HUB_ID.fullmatch(name):
        raise UserError(f"tokenizer {name}: no such folder or file")
    offline = not is_folder and not _hub_in_reach()
    try:
        # Control tokens inside contents are the renderer's business, whatever the configuration says.
        return TokenizersBackend.from_pretrained(name, local_files_only=offline, split_special_tokens=False)
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for unknown names, bad files
        first_line = (str(error).splitlines() or [""])[0]
        if offline:
            first_line = (
                "the Hub cannot be reached and its cache holds none; download it where there is network, "
                "and give the folder"
            )
        kind = "" if is_folder else "no such folder; as a Hub id: "
        raise UserError(f"tokenizer {name}: {kind}{first_line}") from error


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def _hub_in_reach() -> bool:
    """Whether anybody answers at the Hub's address, or its proxy's: huggingface_hub would try for minutes."""
    proxies = (os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    url = next(filter(None, proxies), None) or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def check_against_file(tokenizer: AnyTokenizer, file: Path) -> None:
    """Refuse a tokenizer whose configuration made it differ from its own tokenizer.json."""
    if not file.is_file():
        return  # a Hub id: the file lies somewhere in the cache
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    text = PROBE + f"\n {tokenizer.eos_token or ''}\n {tokenizer.eos_token or ''} x"
    raw_ids = raw.encode(text, add_special_tokens=False).ids
    if raw_ids != tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
        raise UserError(
            f"tokenizer {file.parent}: tokenizer_config.json changes what tokenizer.json computes; to write "
            "one that is the same everywhere, as transformers understands the two, run: "
            f"omnidata prepare-tokenizer {shlex.quote(str(file.parent))} --out DIR"
        )


def fingerprint(tokenizer: AnyTokenizer) -> str:
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


def template_fingerprint(tokenizer: AnyTokenizer) -> str:
    """Hex sha256 of the chat template's text ("" if there is none)."""
    return hashlib.sha256(template_text(tokenizer).encode()).hexdigest()


def template_text(tokenizer: AnyTokenizer) -> str:
    """The chat template that apply_chat_template takes by default ("" if there is none)."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates
        template = template.get("default")
    return template or ""


def special_token_ids(tokenizer: AnyTokenizer, more: Iterable[str] = ()) -> dict[str, int]:
    """Ids of the special tokens that the tokenizer has: bos, eos, pad, unk, image, grounding, slice tokens.

    ``more`` names others to include if it has them.
    """
    named = _named_tokens(tokenizer)
    named |= {token: token for token in more if token in tokenizer.added_tokens_encoder}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}


def _named_tokens(tokenizer: AnyTokenizer) -> dict[str, str]:
    roles = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    present = tokenizer.added_tokens_encoder
    ours = {token: token for token in IMAGE_TOKENS + CONTENT_TOKENS + SLICE_TOKENS if token in present}
    return {name: token for name, token in roles.items() if token is not None} | ours
