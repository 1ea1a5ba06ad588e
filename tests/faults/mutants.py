"""Mutants: the code made wrong on purpose, in a copy. Each must make a test fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.table import Row

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One wrong line, and the tests that must see it."""

    name: str
    path: str
    right: str  # stands in the file exactly once
    wrong: str
    tests: str  # as pytest takes them


MUTANTS = (
    Mutant(
        "no fsync of a file",
        "omnidata/durable.py",
        "                os.fsync(file.fileno())\n",
        "",
        "tests/test_faults.py -k power",
    ),
    Mutant(
        "no fsync of a folder",
        "omnidata/durable.py",
        "        sync(final.parent)\n",
        "        pass\n",
        "tests/test_faults.py -k power",
    ),
    Mutant(
        "no fsync of a new folder's name",
        "omnidata/durable.py",
        "        sync(path.parent)\n",
        "        pass\n",
        "tests/test_faults.py -k power",
    ),
    Mutant(
        "no fsync of a removal",
        "omnidata/durable.py",
        "            sync(Path(self.full(path)).parent)\n",
        "            pass\n",
        "tests/test_faults.py -k removed",
    ),
    Mutant(
        "written in place",
        "omnidata/durable.py",
        '        temporary = Path(self.full(f"{TEMP}/{temp_name(path)}"))\n',
        "        final.unlink(missing_ok=True)\n        temporary = final\n",
        "tests/test_durable.py",
    ),
    Mutant(
        "an existing tar is trusted",
        "omnidata/builder/worker.py",
        "    if info and store.size(info.path) != info.num_bytes:\n",
        "    if info and store.size(info.path) is None:\n",
        "tests/test_interrupted_build.py -k damaged_unfinished",
    ),
    Mutant(
        "settings forgotten when a build goes on",
        "omnidata/builder/identity.py",
        "        if old.get(name) != new.get(name)\n",
        '        if name != "quality" and old.get(name) != new.get(name)\n',
        "tests/test_faults.py -k setting",
    ),
    Mutant(
        "a lease is never refreshed",
        "omnidata/locks.py",
        "    threading.Thread(target=refresh, daemon=True).start()\n",
        "",
        "tests/test_faults.py -k lease",
    ),
    Mutant(
        "both win a lease",
        "omnidata/locks.py",
        '    if json.loads(store.read_bytes(path)).get("token") != token:\n',
        "    if False:\n",
        "tests/test_faults.py -k lease",
    ),
    Mutant(
        "the checked address is not dialled",
        "omnidata/images/web.py",
        "        *others, last = self.addresses\n",
        "        *others, last = [(self.host, self.port)]\n",
        "tests/test_web.py -k dialled",
    ),
    Mutant(
        "local reads are not hashed",
        "omnidata/loader/reader.py",
        "            if self._checksum:\n",
        "            if False:\n",
        "tests/test_hostile_dataset.py -k flipped_bits_of_a_local",
    ),
    Mutant(
        "no bound on what a zip unpacks to",
        "omnidata/images/archives.py",
        ".decompress(data, member.size + 1)",
        ".decompress(data)",
        "tests/test_faults.py -k zip",
    ),
)


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """One row for all; short: none, only that each still finds its line."""
    with Row("the tests themselves", "mutants of the code").timed() as row:
        for mutant in MUTANTS:
            row.tried += 1
            source = (ROOT / mutant.path).read_text()
            if source.count(mutant.right) != 1:
                row.fail("not_found", f"{mutant.name}: its line is not there once")
            elif not short and _lives(mutant, source, folder / "copy"):
                row.fail("not_found", f"{mutant.name}: lives")
    yield row


def _lives(mutant: Mutant, source: str, copy: Path) -> bool:
    for name in ("omnidata", "omnimodel", "pipelines", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / mutant.path).write_text(source.replace(mutant.right, mutant.wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=300)
    shutil.rmtree(copy)
    return done.returncode != 1  # 1: a test failed; anything else proves nothing
