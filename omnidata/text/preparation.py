"""Preparation: a tokenizer that a model with pictures can train with, from whatever its authors gave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, UserError
from omnidata.text.chat_template import ZEPHYR
from omnidata.text.convert import converted
from omnidata.text.tokenizer import fingerprint, load_tokenizer, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from omnidata.text.prepared import AnyTokenizer

NAMED = {"zephyr": ZEPHYR}  # chat templates by name


def prepare_tokenizer(
    source: str | Path,
    out: str | Path,
    *,
    chat_template: str | None = None,
    slice_tokens: Sequence[str] = (),
) -> object:
    """Write to folder ``out`` a tokenizer that OmniLMM can train with, and return it as loaded from there.

    ``source`` is an HF tokenizer (folder or id), or a file that convert.py knows. Each of IMAGE_TOKENS and
    CONTENT_TOKENS is added once, as a special token; after them ``slice_tokens``, which a build with
    --max-slices needs. ``chat_template``: None for the source's own, ``zephyr``, a path of a Jinja
    file, or the template itself.

    Raises:
        UserError: the source cannot be read, has no template and none is named, or ``out`` not be written.
    """
    tokenizer = converted(source)
    tokenizer.chat_template = _resolve_template(chat_template, tokenizer, source=source)
    _add_tokens(tokenizer, (*IMAGE_TOKENS, *CONTENT_TOKENS, *slice_tokens))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    try:
        Path(out).mkdir(parents=True, exist_ok=True)  # where it cannot, save_pretrained logs and goes on
        tokenizer.save_pretrained(str(out))
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        raise UserError(f"cannot write to {out!s}: {error}; choose another --out") from error
    loaded = load_tokenizer(out)
    if fingerprint(loaded) != fingerprint(tokenizer):
        raise UserError(f"tokenizer {source} does not survive being saved and loaded; do not train with it")
    return loaded


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    present = tokenizer.added_tokens_encoder
    missing = [token for token in tokens if token not in present]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _resolve_template(choice: str | None, tokenizer: AnyTokenizer, *, source: str | Path) -> str:
    own = template_text(tokenizer)
    if choice in (None, "keep"):
        if not own:
            raise UserError(
                f"tokenizer {source} has no chat template: name one with --chat-template, "
                f"{' or '.join(NAMED)} (what OmniLMM trains on) or a Jinja file"
            )
        return own
    return resolved_template(choice)


def resolved_template(choice: str) -> str:
    """The text of a chat template: ``zephyr``, a path of a Jinja file, or the template itself.

    Raises:
        UserError: there is no such file.
    """
    if choice in NAMED:
        return NAMED[choice]
    if "{%" in choice or "{{" in choice:
        return choice
    if not Path(choice).is_file():
        raise UserError(
            f"chat template {choice}: no such file; give a Jinja file, a template, {' or '.join(NAMED)}"
        )
    return Path(choice).read_text(encoding="utf-8")
