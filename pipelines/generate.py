"""Ask a trained model.

    python pipelines/generate.py --model runs/demo/final --image cat.jpg --question "What is this?"
    python pipelines/generate.py --model runs/demo/final --questions questions.jsonl --json
    python pipelines/generate.py --model runs/demo/final --image cat.jpg --chat

A line of a questions file is ``{"image": "cat.jpg" or a list, "question": "…", "truth": "…"}``; image and
truth may be absent. ``<image>`` in a question says where a picture goes; without it, pictures come first.

The prompt is made by the code that rendered the training data, and pictures are cut (where that was built
with --max-slices), decoded and resized as in training. Sampling starts from the original's settings;
``--greedy`` takes the likeliest token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

import torch

from omnidata.schema import UserError
from omnimodel.modeling import SAMPLING

from .evaluate import load_for_answers
from .prompts import Turns
from .questions import Prompts, until


@dataclass(frozen=True)
class Ask:
    """One question with its pictures."""

    question: str
    images: tuple[str, ...] = ()
    truth: str | None = None


class Answerer:
    """A model with its prompts, and how to sample."""

    def __init__(self, prompts: Prompts, *, sampling: dict[str, Any]) -> None:
        self.prompts, self.sampling = prompts, sampling

    @torch.inference_mode()
    def reply(self, turns: Turns, images: Sequence[str], *, stream: bool = False) -> str:
        """The assistant's next words; with ``stream`` they also appear on the terminal as they come."""
        from transformers import TextStreamer

        prompts = self.prompts
        ids, stored = prompts.prompt(turns, images)
        output = prompts.model.generate(
            **prompts.inputs([ids], [stored]),
            eos_token_id=prompts.end_tokens,
            pad_token_id=prompts.pad,
            streamer=TextStreamer(prompts.tokenizer, skip_prompt=True) if stream else None,
            **self.sampling,
        )
        new = output[0, len(ids) :].tolist()
        return prompts.tokenizer.decode(until(new, prompts.end_tokens)).strip()


def read_questions(options: argparse.Namespace) -> Iterator[Ask]:
    """From the command line or from a file."""
    if options.question is not None:
        yield Ask(options.question, tuple(options.image), options.truth)
        return
    try:
        lines = Path(options.questions).read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {options.questions}: {error.strerror}") from error
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            row = json.loads(line)
            images = row.get("image") or ()
            yield Ask(
                row["question"], (images,) if isinstance(images, str) else tuple(images), row.get("truth")
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f'{options.questions} line {number}: expected {{"image": …, "question": …}}, got {line[:80]}'
            ) from error


def answer_all(answerer: Answerer, asks: Iterator[Ask], *, as_json: bool) -> None:
    """Print every question, answer and truth; one JSON object per line with --json."""
    for ask in asks:
        answer = answerer.reply([{"role": "user", "content": ask.question}], ask.images)
        if as_json:
            row = {"image": list(ask.images), "question": ask.question, "answer": answer, "truth": ask.truth}
            print(json.dumps(row, ensure_ascii=False))
            continue
        print(f"question: {ask.question}\nanswer:   {answer}")
        if ask.truth is not None:
            print(f"truth:    {ask.truth}")


def chat(answerer: Answerer, images: Sequence[str]) -> None:
    """Question after question about the same pictures, until an empty line."""
    turns: Turns = []
    while question := input("you: ").strip():
        turns.append({"role": "user", "content": question})
        print("model: ", end="", flush=True)
        turns.append({"role": "assistant", "content": answerer.reply(turns, images, stream=True)})


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.question is not None) + (options.questions is not None) + options.chat != 1:
        parser.error("give exactly one of --question, --questions and --chat")
    torch.manual_seed(options.seed)
    try:
        prompts = load_for_answers(options.model, device=options.device, dtype=options.dtype)
        answerer = Answerer(prompts, sampling=_sampling(options))
        if options.chat:
            chat(answerer, options.image)
        else:
            answer_all(answerer, read_questions(options), as_json=options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print()
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    if options.greedy:
        return {"do_sample": False, "max_new_tokens": options.max_new_tokens}
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
    return {"do_sample": True} | {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of save_pretrained")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture; may be repeated"
    )
    parser.add_argument("--question", metavar="TEXT")
    parser.add_argument("--truth", metavar="TEXT", help="printed beside the answer")
    parser.add_argument("--questions", metavar="FILE", help="JSON lines of questions")
    parser.add_argument("--chat", action="store_true", help="talk about the pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer")
    parser.add_argument("--greedy", action="store_true", help="no sampling")
    parser.add_argument("--temperature", type=float, default=SAMPLING["temperature"])
    parser.add_argument("--top-k", type=int, default=SAMPLING["top_k"])
    parser.add_argument("--top-p", type=float, default=SAMPLING["top_p"])
    parser.add_argument("--repetition-penalty", type=float, default=SAMPLING["repetition_penalty"])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
