"""A processor's files: read from a model's folder or Hub id, kept in the dataset.

    MODEL/  config.json, processor_config.json, preprocessor_config.json, tokenizer.json, chat template …
      ->  DATASET/processor/   all of the processor's, as save_pretrained writes them, and config.json
          DATASET/tokenizer/   the tokenizer alone, with the processor's chat template

No code of a model's folder is ever run (``trust_remote_code`` is off): processors are transformers' classes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnidata.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

CONFIG = "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGE = re.compile(
    r"[Nn]o module named '([\w.]+)'|requires? the (\w[\w-]*) library|`(?:pip install )([\w-]+)`"
)


def load_processor(name: str | os.PathLike[str]) -> ProcessorMixin:
    """The processor of a model's folder or Hub id.

    Raises:
        UserError: there is none, a package that it needs is missing, or it has no tokenizer of the fast kind.
    """
    name = os.fspath(name)
    if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
        raise UserError(f"--model {name}: no such folder; give a model's folder or its Hub id (OWNER/NAME)")
    from transformers import AutoProcessor

    try:
        with _quiet():
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"--model {name}: {_missing_package(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--model {name}: no processor can be loaded from it: {_first_line(error)}"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"--model {name} has a {type(processor).__name__} but no processor of pictures and text "
            "(processor_config.json or preprocessor_config.json); a text model goes to --tokenizer"
        )
    _check_speaks(processor, name)
    return processor


def _check_speaks(processor: ProcessorMixin, name: str) -> None:
    if not chat_template(processor):
        raise UserError(
            f"--model {name}: neither its processor nor its tokenizer has a chat template; take the instruct "
            "model's folder, or put its chat_template.jinja into this one"
        )
    if getattr(processor.tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"--model {name}: {type(processor.tokenizer).__name__} is not a fast tokenizer")
    if not getattr(processor, "image_token", None):
        raise UserError(
            f"--model {name}: {type(processor).__name__} names no image_token, so it cannot be asked what "
            "stands for a picture"
        )


def chat_template(processor: ProcessorMixin) -> str:
    """The template that the processor's ``apply_chat_template`` takes ("" if there is none)."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def save_processor(processor: ProcessorMixin, source: str, folder: str) -> None:
    """Write the processor, and the model's config.json if there is one, into ``folder``."""
    with _quiet():
        processor.save_pretrained(folder)
    config = _config_file(source)
    if config is not None:
        shutil.copyfile(config, Path(folder) / CONFIG)


def _config_file(source: str) -> str | None:
    if Path(source).is_dir():
        file = Path(source) / CONFIG
        return str(file) if file.is_file() else None
    from transformers.utils import cached_file

    return cached_file(source, CONFIG, _raise_exceptions_for_missing_entries=False)


def model_config(folder: str | os.PathLike[str]) -> PreTrainedConfig | None:
    """The model's configuration in a processor's folder; None: it came without one."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        return None
    from transformers import AutoConfig

    try:
        with _quiet():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: {_first_line(error)}") from error


def parse_arguments(texts: Sequence[str]) -> dict[str, object]:
    """``("max_pixels=1003520", "crop_to_patches=true")`` -> call arguments; values are JSON or plain text."""
    arguments: dict[str, object] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found or not name.isidentifier():
            raise UserError(f"--processor-arg {text!r}: write NAME=VALUE, as in max_pixels=1003520")
        if name in arguments:
            raise UserError(f"--processor-arg {name} is given twice")
        arguments[name] = _value(value)
    return arguments


def _value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def _quiet() -> Any:
    """Without transformers' advice on its own defaults."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _missing_package(error: ImportError) -> str:
    found = _PACKAGE.search(str(error))
    package = next((group for group in found.groups() if group), None) if found else error.name
    remedy = f"; run: pip install {package}" if package else ""
    return f"its processor needs a package that is missing: {_first_line(error)}{remedy}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
