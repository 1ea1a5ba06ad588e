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
        "        if self._checksum:\n",
        "        if False:\n",
        "tests/test_hostile_dataset.py -k flipped_bits_of_a_local",
    ),
    Mutant(
        "no bound on what a zip unpacks to",
        "omnidata/images/archives.py",
        ".decompress(data, member.size + 1)",
        ".decompress(data)",
        "tests/test_faults.py -k zip",
    ),
    Mutant(
        "the end of a reply is not learned",
        "omnidata/text/spans.py",
        "        labels[first:end] = ids[first:end]\n",
        "        labels[first : end - 1] = ids[first : end - 1]\n",
        "tests/test_golden.py -k ids_and_labels",
    ),
    Mutant(
        "typed control tokens are control tokens",
        "omnidata/text/guarding.py",
        '        token["content"] = guards.get(token["content"], token["content"])\n'
        '    _rename_pieces(state["model"], guards)\n',
        "        pass\n",
        "tests/test_golden.py -k typed",
    ),
    Mutant(
        "media under an unread key is nothing",
        "omnidata/corpus/keys.py",
        "        return any(self._could_be_media(leaf, is_clear) for leaf in _leaves(value))\n",
        "        return False\n",
        "tests/test_keys.py -k media_under",
    ),
    Mutant(
        "the time in a tar's headers",
        "omnidata/shards.py",
        'info.uname, info.gname, info.mtime = 0o644, 0, 0, "", "", 0\n',
        'info.uname, info.gname, info.mtime = 0o644, 0, 0, "", "", 1_700_000_000\n',
        "tests/test_shards.py -k header_equals",
    ),
    Mutant(
        "a shard's sha256 is not compared",
        "omnidata/verify/shard.py",
        "        if walk.sha256 != shard.sha256:\n",
        "        if False:\n",
        "tests/test_verify.py -k every_flipped_bit_of_a_shard",
    ),
    Mutant(
        "labels are not shifted",
        "omnidata/loader/microbatch.py",
        "        labels[start : stop - 1] = sample.labels[1:]\n",
        "        labels[start:stop] = sample.labels\n",
        "tests/test_loader.py -k shifted_once",
    ),
    Mutant(
        "the denominator is a microbatch's own",
        "omnidata/loader/loader.py",
        "            num_supervised_tokens=about.num_supervised_tokens,\n",
        "            num_supervised_tokens=int((parts.labels != IGNORE_INDEX).sum()),\n",
        "tests/test_loader.py -k denominator",
    ),
    Mutant(
        "documents of a pack see each other",
        "omnimodel/attention.py",
        "    if cu_seq_lens_q is None:\n        return sdpa",
        "    if True:\n        return sdpa",
        "tests/test_attention.py -k packed_equals",
    ),
    Mutant(
        "a model that mixes documents is taken",
        "omnimodel/isolation.py",
        "        if not self.packed <= TOLERANCE[self.dtype] or not self.joined > MARGIN * self.packed:\n",
        "        if False:\n",
        "tests/test_packed.py -k with_both_differences",
    ),
    Mutant(
        "a checkpoint's checksums are not compared",
        "pipelines/checksums.py",
        "        if digest != expected[name]:\n",
        "        if False:\n",
        "tests/test_checkpoint.py -k damaged_checkpoint",
    ),
    Mutant(
        "a private address is public",
        "omnidata/images/web.py",
        "        return not any(ip in network for network in _SPECIAL_V4)\n",
        "        return True\n",
        "tests/test_web.py -k private",
    ),
    Mutant(
        "code beside a processor runs",
        "omnidata/profiles/folder.py",
        "            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)\n",
        "            processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)\n",
        "tests/test_foreign_code.py -k told_not",
    ),
    Mutant(
        "a reject is dropped",
        "omnidata/builder/worker.py",
        "                self.rejects.append(outcome)\n",
        "                pass\n",
        "tests/test_build.py -k every_record_is",
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
