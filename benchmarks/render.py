"""How far is rendering (template, mask, image blocks) from the tokenizer's own encode_batch?

    python benchmarks/render.py [--json] [--records 4000]

Both sides run in one process on one thread and take turns; the fastest round of each counts. The floor
encodes ready-made texts without images and takes their ids as lists. Texts are passages of Python's language
reference, whose words come back (omnidata/text/words.py); in the first round they are new.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

from corpus import prose
from vocabularies import NAMES
from vocabularies import tokenizer as tokenizer_of

os.environ["TOKENIZERS_PARALLELISM"] = "false"

BATCH, ROUNDS = 128, 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {name: measure(name, options.records) for name in NAMES}
    if options.json:
        print(json.dumps(result))
        return
    for name, figures in result.items():
        print(f"{name}'s vocabulary")
        print("\n".join(f"  {figure:36} {value:10.3f}" for figure, value in figures.items()))


def measure(vocabulary: str, num_records: int) -> dict[str, float]:
    """Microseconds per record of each side, and their ratios."""
    from omnidata.render import Renderer

    tokenizer = tokenizer_of(vocabulary)
    renderer = Renderer(tokenizer, max_length=None)
    proving = Renderer(tokenizer, max_length=None)
    proving._template.is_opaque = False
    words = prose()
    conversations = [talk(i, words) for i in range(num_records)]
    plain = [as_messages(conversation) for conversation in conversations]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in plain]
    backend = tokenizer.backend_tokenizer
    sides = {
        "encode_batch": lambda batch: [e.ids for e in backend.encode_batch(texts[batch])],
        "encode_batch_fast": lambda batch: [e.ids for e in backend.encode_batch_fast(texts[batch])],
        "render_batch": lambda batch: renderer.render_batch(conversations[batch]),
        "render_batch, each record proven": lambda batch: proving.render_batch(conversations[batch]),
        "apply_chat_template": lambda batch: [
            tokenizer.apply_chat_template(messages, return_dict=False) for messages in plain[batch]
        ],
    }
    best = dict.fromkeys(sides, float("inf"))
    first: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            seconds = timed(side, num_records)
            first.setdefault(name, seconds)
            best[name] = min(best[name], seconds)
    result = {f"{name}, us": seconds / num_records * 1e6 for name, seconds in best.items()}
    result["render_batch, first round, us"] = first["render_batch"] / num_records * 1e6
    result["render / encode_batch"] = best["render_batch"] / best["encode_batch"]
    result["apply_chat_template / render"] = best["apply_chat_template"] / best["render_batch"]
    result["tokens per record"] = (
        sum(len(r.input_ids) for r in renderer.render_batch(conversations)) / num_records
    )
    return result


def timed(side: Callable[[slice], Any], num_records: int) -> float:
    """Seconds of processor time (which others on the machine disturb less) for all records in batches."""
    start = time.process_time()
    for first in range(0, num_records, BATCH):
        side(slice(first, first + BATCH))
    return time.process_time() - start


def talk(seed: int, words: list[str]) -> Any:
    """One to four questions about a picture, of the lengths that LLaVA's have."""
    from omnidata.schema import Conversation, ImagePart, ImageRef, Message, TextPart

    rng = random.Random(seed)

    def passage(length: int) -> str:
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    messages = []
    for turn in range(rng.randint(1, 4)):
        question = TextPart("\n" * (turn == 0) + passage(rng.randint(5, 20)) + "?")
        answer = TextPart(passage(rng.choice([3, 20, 60, 120])) + ".")
        messages.append(Message("user", (ImagePart(0), question) if turn == 0 else (question,)))
        messages.append(Message("assistant", (answer,)))
    return Conversation(str(seed), tuple(messages), (ImageRef(path="x.jpg"),))


def as_messages(conversation: Any) -> list[dict[str, str]]:
    """For apply_chat_template, without pictures."""
    return [{"role": message.role, "content": message.text} for message in conversation.messages]


if __name__ == "__main__":
    main()
