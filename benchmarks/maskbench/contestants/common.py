"""What the contestants share: read the questions, answer each, write ids and labels.

    python contestants/NAME.py QUESTIONS TOKENIZERS OUT

QUESTIONS holds a line per template and conversation, see run.py; OUT gets a line per answer: ``input_ids``
and ``labels``, or ``outcome`` (refused, crashed, not run) and ``detail``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = tuple[list[int], list[int]]


class RefusedError(Exception):
    """The contestant says itself that it can't do this."""


class NotRunError(Exception):
    """It does not claim to do this."""


def main(prepare: Callable[[Path], Callable[[dict[str, Any]], Answer]]) -> None:
    """``prepare(tokenizer folder)`` gives the function that answers one question."""
    questions, tokenizers, out = map(Path, sys.argv[1:4])
    answerers: dict[str, Any] = {}
    with open(out, "w", encoding="utf-8") as file:
        for line in questions.read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            name = question["template"]
            if name not in answerers:
                answerers[name] = attempt(lambda: prepare(tokenizers / name))  # noqa: B023 - called at once
            answer = answerers[name]
            if not isinstance(answer, dict):
                answer = attempt(lambda: answered(answer, question))  # noqa: B023 - called at once
            file.write(json.dumps({"template": name, "name": question["name"], **answer}) + "\n")


def answered(answer: Any, question: dict[str, Any]) -> dict[str, Any]:
    ids, labels = answer(question)
    return {"input_ids": [int(x) for x in ids], "labels": [int(x) for x in labels]}


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except NotRunError as error:
        return {"outcome": "not run", "detail": str(error)}
    except RefusedError as error:
        return {"outcome": "refused", "detail": str(error)}
    except MemoryError:  # of this machine, not of the contestant
        raise
    except Exception as error:  # noqa: BLE001 - whatever a contestant raises is its answer
        return {"outcome": "crashed", "detail": f"{type(error).__name__}: {error}"}


def marked_template(folder: Path) -> str:
    """The template with {% generation %}, for those that need it."""
    return (folder / "generation.jinja").read_text(encoding="utf-8")


def text_only(question: dict[str, Any]) -> None:
    """Pictures are asked of those that say they take them with these tokenizers."""
    if question["num_images"]:
        raise NotRunError("no processor for pictures with this tokenizer")
