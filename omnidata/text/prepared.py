"""A tokenizer from its own folder without transformers, which takes a second to import.

``tokenizer.json`` says what ids a text has; ``tokenizer_config.json`` adds names of tokens and a template. A
folder that transformers' generic class wrote needs no more than that. Any other (a class of its own, keys
that could change ids, tokens that are not in the file yet) is for ``omnidata.text.tokenizer.load_tokenizer``,
which gives the same ids, names and template for the folders that are read here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENERIC = "TokenizersBackend"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Keys of a configuration that change no id where our classes encode, in transformers' generic class.
_HARMLESS = frozenset(
    (
        *("backend", "tokenizer_class", "processor_class", "name_or_path", "is_local", "local_files_only"),
        *("chat_template", "extra_special_tokens", "split_special_tokens", "clean_up_tokenization_spaces"),
        *("model_max_length", "model_input_names", "truncation_side", "padding_side", "legacy"),
        *("sp_model_kwargs", "spaces_between_special_tokens", "use_default_system_prompt", "errors"),
    )
)
_MAY_BE_PATCHED = (
    100_000  # tokens beyond which transformers looks for Mistral's faulty pattern in config.json
)


@dataclass(frozen=True)
class PreparedTokenizer:
    """What building a dataset asks of a tokenizer, under the names that transformers uses."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    chat_template: str | None
    special_tokens_map: dict[str, str]  # {"bos_token": "<s>", …}: those that it has
    added_tokens_encoder: dict[str, int]
    name_or_path: str

    def __getattr__(self, name: str) -> str | None:
        if name in _ROLES:
            return self.special_tokens_map.get(name)
        raise AttributeError(name)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, if there is one."""
        token = self.bos_token
        return None if token is None else self.convert_tokens_to_ids(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        """The id of a token, or of each."""
        if isinstance(tokens, str):
            return self.backend_tokenizer.token_to_id(tokens)
        return [self.backend_tokenizer.token_to_id(token) for token in tokens]

    def save_pretrained(self, folder: str) -> None:
        """Copy the files: they are whole as they are."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (source := Path(self.name_or_path) / name).is_file():
                shutil.copyfile(source, Path(folder) / name)


def load_prepared(folder: str | Path) -> PreparedTokenizer | None:
    """The tokenizer of a folder that needs no transformers; None for any other, and for what is no folder."""
    folder = Path(folder)
    if not all((folder / name).is_file() for name in FILES[:2]):
        return None
    try:
        config = json.loads((folder / FILES[1]).read_text("utf-8"))
        state = json.loads((folder / FILES[0]).read_text("utf-8"))
    except ValueError:
        return None  # transformers says what is wrong
    if not _is_plain(config, state, folder):
        return None
    from tokenizers import Tokenizer

    template = config.get("chat_template")
    if (folder / FILES[2]).is_file():
        template = (folder / FILES[2]).read_text("utf-8")
    return PreparedTokenizer(
        backend_tokenizer=Tokenizer.from_file(str(folder / FILES[0])),
        chat_template=template,
        special_tokens_map={role: _content(config[role]) for role in _ROLES if config.get(role)},
        added_tokens_encoder={token["content"]: token["id"] for token in state["added_tokens"]},
        name_or_path=str(folder),
    )


def _is_plain(config: Any, state: Any, folder: Path) -> bool:
    """Whether transformers' generic class would add nothing to what tokenizer.json computes."""
    if not isinstance(config, dict) or config.get("tokenizer_class") != GENERIC:
        return False
    if not isinstance(state, dict) or not {"added_tokens", "model"} <= state.keys():
        return False
    if config.keys() - _HARMLESS - set(_ROLES) or not isinstance(config.get("chat_template", ""), str):
        return False
    if state.get("truncation") or state.get("padding") or state.get("post_processor") is None:
        return False
    more = config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        return False
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    named = {_content(config[role]) for role in _ROLES if config.get(role)} | set(map(_content, more))
    patched = len(state["model"].get("vocab", ())) > _MAY_BE_PATCHED and (folder / "config.json").is_file()
    others = (folder / "additional_chat_templates").exists() or (folder / "chat_template.json").exists()
    return named <= special and not patched and not others


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
