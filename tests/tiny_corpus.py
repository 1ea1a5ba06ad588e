"""A tiny raw corpus with photos, and a build of it: for tests of the builder.

corpus = write_corpus(tmp_path)             # 60 LLaVA records, 40 chat records, 5 of them bad
corpus.build(out, workers=1)                # BuildReport
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_dataset import write_tokenizer

from omnidata import durable
from omnidata.builder.build import build
from omnidata.builder.settings import BuildSettings, RunOptions

# What is wrong with which record: reason -> (source, number)
BAD = {
    "image_missing": ("llava.json", 7),
    "image_corrupt": ("llava.json", 11),
    "bad_role": ("llava.json", 13),
    "placeholder_mismatch": ("llava.json", 17),
    "no_assistant": ("chat.jsonl", 3),
    "bad_json": ("chat.jsonl", 5),
}


@dataclass(frozen=True)
class Corpus:
    """Where it is, and the settings that its builds have unless told otherwise."""

    folder: Path
    settings: BuildSettings
    num_records: int

    def build(self, out: Any, *, options: RunOptions | None = None, **settings: Any) -> Any:
        """Build it; keyword arguments are settings."""
        options = options or RunOptions(workers=1, quiet=True)
        return build(replace(self.settings, **settings), str(out), options)


def jpeg(seed: int, *, size: tuple[int, int] = (64, 48)) -> bytes:
    """A small JPEG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def llava_record(number: int) -> dict[str, Any]:
    """Record ``number``: no, one or two images."""
    images = [f"{(number + k) % 10}.jpg" for k in range(number % 3)]
    places = "<image>" * len(images)
    question = {"from": "human", "value": f"{places}\nWhat is in picture {number}?"}
    record = {
        "id": f"llava-{number}",
        "conversations": [question, {"from": "gpt", "value": f"No. {number}."}],
    }
    return record | ({"image": images} if images else {})


def chat_record(number: int) -> dict[str, Any]:
    """A text-only record."""
    messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": f"{number}!"}]
    return {"id": f"chat-{number}", "messages": messages}


def write_corpus(folder: Path, *, num_llava: int = 60, num_chat: int = 40, bad: bool = True) -> Corpus:
    """Write photos, two corpora and a tokenizer."""
    (folder / "photos").mkdir(parents=True)
    for number in range(10):
        (folder / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "photos" / "torn.jpg").write_bytes(jpeg(0)[:300])
    llava = [llava_record(number) for number in range(num_llava)]
    chat = [json.dumps(chat_record(number)) for number in range(num_chat)]
    if bad:
        llava[7]["image"] = ["nowhere.jpg"]
        llava[11] |= {"image": ["torn.jpg", "1.jpg"]}
        llava[13]["conversations"].insert(0, {"from": "narrator", "value": "Once upon a time"})
        llava[17]["conversations"][0]["value"] += "<image>"
        chat[3] = json.dumps({"id": "chat-3", "messages": [{"role": "user", "content": "Anybody?"}]})
        chat[5] = '{"id": "chat-5", "messages": ['
    (folder / "llava.json").write_text(json.dumps(llava))
    (folder / "chat.jsonl").write_text("\n".join(chat) + "\n")
    write_tokenizer(folder / "tokenizer")
    settings = BuildSettings(
        source=(str(folder / "llava.json"), str(folder / "chat.jsonl")),
        tokenizer=str(folder / "tokenizer"),
        image_root=str(folder / "photos"),
        num_query=4,
        image_size=32,
        samples_per_shard=15,
        split={"val": 0.1},
    )
    return Corpus(folder, settings, num_llava + num_chat)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file: two builds are the same if these are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed_at(step, corpus, out):
    """Build in a child that kills itself at a durable step; -> whether it came that far."""
    return killed(step, lambda: corpus.build(out, options=RunOptions(executor="inline", quiet=True)))


def killed(step, work):
    """Work in a child that kills itself at a durable step; -> whether it came that far."""

    def die(name, path):
        nonlocal step
        step -= 1
        if step < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        durable.on_step = die
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
