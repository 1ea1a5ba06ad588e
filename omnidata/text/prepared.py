"""A tokenizer from its own folder without transformers, which takes a second to import.

``tokenizer.json`` says what ids a text has; ``tokenizer_config.json`` adds names of tokens and a template.
Most folders need no more than that, whatever class their configuration names: the generic class, which
``omnidata.text.tokenizer.load_tokenizer`` always takes, reads the same two files. What could make that class
change ids or names is left to it (tokens that are not in the file yet, other flags for those that are, keys
not listed here): ``load_prepared`` gives None. For every folder that is read here, ids, names and template
are the same as there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from omnidata.text.guarding import added_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | PreparedTokenizer"  # they answer alike
GENERIC = "TokenizersBackend"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # today's name, and the one before
# Keys of a configuration that change no id and no name in transformers' generic class, if there is a
# tokenizer.json. (add_bos_token and add_eos_token are dropped there: the file's post-processor says it.)
_HARMLESS = frozenset(
    (
        *("backend", "tokenizer_class", "processor_class", "name_or_path", "is_local", "local_files_only"),
        *("chat_template", "split_special_tokens", "clean_up_tokenization_spaces", "added_tokens_decoder"),
        *("model_max_length", "model_input_names", "truncation_side", "padding_side", "legacy", "auto_map"),
        *("sp_model_kwargs", "spaces_between_special_tokens", "use_default_system_prompt", "errors"),
        *("add_bos_token", "add_eos_token", "add_prefix_space", "use_fast", "do_lower_case"),
    )
)
_KEPT = _HARMLESS - frozenset(
    (
        *("chat_template", "added_tokens_decoder", "auto_map", "add_bos_token", "add_eos_token"),
        *("name_or_path", "is_local", "local_files_only"),
    )
)
_LEGACY = "special_tokens_map.json"  # read where the configuration does not list the added tokens
# Files beside the two of which transformers may take tokens or templates.
_OTHERS = ("added_tokens.json", "additional_chat_templates", "chat_template.json")
_BACKENDS: dict[
    bytes, Tokenizer
] = {}  # by hash of the file; workers inherit it from the server (builder/warm.py)
# Models whose early tokenizers transformers warns of (more than 100,000 tokens, saved before 5.0).
_WARNED_OF = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")


@dataclass(frozen=True)
class PreparedTokenizer:
    """What building a dataset asks of a tokenizer, under the names that transformers uses."""

    backend_tokenizer: Tokenizer
    chat_template: str | None
    special_tokens_map: dict[str, str]  # {"bos_token": "<s>", …}: those that it has
    added_tokens_encoder: dict[str, int]
    name_or_path: str
    config: dict[str, object]  # the rest of its configuration
    is_as_in_folder: bool = True  # the folder's files are what it is, and name the generic class

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

    def with_special_tokens(self, tokens: Sequence[str]) -> PreparedTokenizer:
        """The same with these special tokens, each added once, and one to pad with."""
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(self.backend_tokenizer.to_str())
        missing = [token for token in tokens if token not in self.added_tokens_encoder]
        backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        pad = self.pad_token or self.unk_token or self.eos_token
        ids = backend.get_vocab(with_added_tokens=True)
        added = {token: ids[token] for token in missing}
        return replace(
            self,
            backend_tokenizer=backend,
            special_tokens_map=self.special_tokens_map | ({"pad_token": pad} if pad else {}),
            added_tokens_encoder=self.added_tokens_encoder | added,
            is_as_in_folder=False,
        )

    def save_pretrained(self, folder: str) -> None:
        """Write the files, under the generic class: one of its own could change ids when it is loaded.

        Those that are like that already are copied, byte for byte.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.is_as_in_folder:
            for name in FILES:
                if (source := Path(self.name_or_path) / name).is_file():
                    shutil.copyfile(source, Path(folder) / name)
            return
        config = json.dumps(self.config | self.special_tokens_map, indent=2, sort_keys=True) + "\n"
        texts = (self.backend_tokenizer.to_str(pretty=True), config, self.chat_template)
        for name, text in zip(FILES, texts, strict=True):
            if text is not None:
                (Path(folder) / name).write_text(text, encoding="utf-8", newline="")


def load_prepared(folder: str | Path) -> PreparedTokenizer | None:
    """The tokenizer of a folder that needs no transformers; None for any other, and for what is no folder."""
    folder = Path(folder)
    if not (folder / FILES[0]).is_file():
        return None
    try:
        backend = _backend(folder / FILES[0])
        config = _read(folder / FILES[1])
        if "added_tokens_decoder" not in config:
            config = _with_legacy(config, _read(folder / _LEGACY))
    except (ValueError, TypeError):
        return None  # transformers says what is wrong
    if not _is_plain(config, backend, folder):
        return None
    return PreparedTokenizer(
        backend_tokenizer=_as_generic(backend),
        chat_template=_template(config, folder),
        special_tokens_map={role: _content(config[role]) for role in _ROLES if config.get(role)},
        added_tokens_encoder={token["content"]: token["id"] for token in added_tokens(backend)},
        name_or_path=str(folder),
        config={key: config[key] for key in config if key in _KEPT} | {"tokenizer_class": GENERIC},
        is_as_in_folder=_is_generic(config, folder),
    )


def _backend(file: Path) -> Tokenizer:
    """The tokenizer of a file; of equal files the same one: reading 150,000 words takes half a second."""
    from tokenizers import Tokenizer

    data = file.read_bytes()
    digest = hashlib.blake2b(data).digest()
    if digest not in _BACKENDS:
        _BACKENDS.clear()  # one is all that a command needs
        _BACKENDS[digest] = Tokenizer.from_buffer(data)
    return _BACKENDS[digest]


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no file."""
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _with_legacy(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, object]:
    """The configuration with the names of a special_tokens_map.json, whose lists are added to its own."""
    lists = {key: (config.get(key) or []) + (legacy[key] or []) for key in _EXTRA if key in legacy}
    return config | legacy | lists


def _is_generic(config: dict[str, object], folder: Path) -> bool:
    """Whether other people's loaders find the generic class, and nothing that it does not need."""
    return (
        config.get("tokenizer_class") == GENERIC
        and "auto_map" not in config
        and (folder / FILES[1]).is_file()
        and not (folder / _LEGACY).is_file()
    )


def _template(config: dict[str, Any], folder: Path) -> str | None:
    file = folder / FILES[2]
    return file.read_text("utf-8") if file.is_file() else config.get("chat_template")


def _as_generic(backend: Tokenizer) -> Tokenizer:
    """transformers gives a tokenizer without post-processor one that adds nothing."""
    from tokenizers import processors

    if backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    return backend


def _is_plain(config: Any, backend: Tokenizer, folder: Path) -> bool:
    """Whether transformers' generic class would add nothing to what tokenizer.json computes."""
    if config.keys() - _HARMLESS - set(_ROLES) - set(_EXTRA):
        return False
    if not isinstance(config.get("chat_template") or "", str):
        return False
    if backend.truncation or backend.padding:
        return False
    if any((folder / name).exists() for name in _OTHERS) or _is_warned_of(backend, folder):
        return False
    return _adds_no_token(config, added_tokens(backend))


def _adds_no_token(config: dict[str, Any], added: list[dict[str, Any]]) -> bool:
    """Whether every token of the configuration is in the file, as a special one and with the same flags."""
    special = {token["content"] for token in added if token["special"]}
    more = [config.get(key) or [] for key in _EXTRA]
    if not all(isinstance(tokens, list) for tokens in more):
        return False  # names for tokens, which a chat template may use
    named = [config[role] for role in _ROLES if config.get(role) is not None] + [
        token for tokens in more for token in tokens
    ]
    if not {_content(token) for token in named} <= special:
        return False
    known = {(token["id"], _content(token)): token for token in added}
    return all(
        isinstance(token, dict)
        and (same := known.get((int(number), _content(token)))) is not None
        and _with_flags(token).items() == same.items() - {("id", int(number))}
        for number, token in (config.get("added_tokens_decoder") or {}).items()
    )


def _with_flags(token: dict[str, object]) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return flags | {"normalized": not token.get("special", False)} | token


def _is_warned_of(backend: Tokenizer, folder: Path) -> bool:
    """Whether transformers may say that the file's pattern is faulty."""
    if backend.get_vocab_size() <= 100_000 or not (folder / "config.json").is_file():
        return False
    try:
        return _read(folder / "config.json").get("model_type") in (None, *_WARNED_OF)
    except (ValueError, TypeError):
        return True


def _content(token: object) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
