"""A small build that is stopped in a child and goes on here; what came of it, sample by sample."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_corpus import Corpus, chat_record, digests, write_corpus

from faults.disk import Disk
from faults.table import Row
from omnidata.builder.settings import RunOptions
from omnidata.dataset import Dataset
from omnidata.schema import MANIFEST, UserError

INLINE = RunOptions(executor="inline", quiet=True)


@dataclass(frozen=True)
class Peace:
    """A corpus, and its dataset built in peace."""

    corpus: Corpus
    digests: dict[str, str]
    keys: tuple[str, ...]


def peace(folder: Path, **settings: object) -> Peace:
    """Two shards, a repeated sample, a few rejects."""
    import json

    corpus = write_corpus(folder / "corpus", num_llava=14, num_chat=6, bad=False)
    lines = [json.dumps(chat_record(0) | {"id": "copy"}), "{oops"]
    with open(corpus.folder / "chat.jsonl", "a") as file:
        file.write("\n".join(lines) + "\n")
    changed = {"samples_per_shard": 11, "split": {}, "dedup": "exact"} | settings
    corpus = replace(corpus, settings=replace(corpus.settings, **changed))
    corpus.build(folder / "peace", options=INLINE)
    keys = Dataset(folder / "peace").index["key"].to_pylist()
    return Peace(corpus, digests(folder / "peace"), tuple(keys))


def in_child(work: Callable[[], None]) -> int:
    """Run in a fork; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def operations(corpus: Corpus, out: Path) -> list[tuple[str, str, str]]:
    """Every operation of a build that nothing disturbs: (when, operation, path)."""
    seen: list[tuple[str, str, str]] = []
    with Disk(lambda *what: seen.append(what)):
        corpus.build(out, options=INLINE)
    shutil.rmtree(out)
    return seen


def at(number: int, act: Callable[[], None]) -> Callable[[str, str, str], None]:
    """A hook that acts at one operation."""
    left = number

    def hook(when: str, operation: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            act()

    return hook


def die() -> None:
    """As kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def go_on(row: Row, peace: Peace, out: Path, what: str) -> None:
    """Run the same build again and judge what it makes; then remove it."""
    if (out / MANIFEST).exists():  # whoever finds a manifest trusts the rest
        here = digests(out) if out.exists() else {}
        judge(
            row,
            peace,
            out,
            {name: here.get(name, "") for name in peace.digests},
            f"{what}: the manifest lies",
        )
        options = replace(INLINE, task=(0, 1))
    else:
        options = INLINE
    try:
        peace.corpus.build(out, options=options)
    except UserError as error:
        row.fail("lost", f"{what}: refused: {error}")
    except Exception as error:  # a mistake of ours: it ends the part, and so the table, with its place
        error.add_note(f"{row.fault}, {row.how}: {what}")
        raise
    else:
        judge(row, peace, out, digests(out), what)
    shutil.rmtree(out)


def judge(row: Row, peace: Peace, out: Path, found: dict[str, str], what: str) -> None:
    """Count what is lost and doubled, if the files are not those of peace."""
    if found == peace.digests:
        return
    wrong = [
        name for name in found.keys() | peace.digests.keys() if found.get(name) != peace.digests.get(name)
    ]
    row.fail("lost", f"{what}: {', '.join(sorted(wrong))}")
    if "index.parquet" in wrong and (out / "index.parquet").exists():
        counts = Counter(Dataset(out).index["key"].to_pylist())
        doubled = sum(count - 1 for count in counts.values())
        if doubled:
            row.fail("doubled", what, doubled)
