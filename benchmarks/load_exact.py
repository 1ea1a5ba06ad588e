"""Exactness: what a restart in mid-epoch repeats and loses, for each contender of load_peers.py.

    same ranks       1 rank reads half an epoch and saves its state; a fresh process goes on to the end
    other ranks      2 ranks read half an epoch and save; 3 ranks go on (rank r from the state of rank r % 2)

Every rank is a process of its own, started as torchrun would. ``repeated`` counts samples read twice over
all ranks, ``lost`` those that nobody read. A contender that refuses the other ranks' state says why: its
epoch would have to begin anew. (Energon has a tool, ``energon checkpoint redist``, that rewrites the states
for another number of ranks beforehand; it is not used here.)

    python load_exact.py FOLDER --name litdata
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from load_peers import CONTENDERS

TIMEOUT = 100  # seconds for one stage


def read_stage(name: str, folder: Path, out: Path, *, stop_after: int | None, state: Path | None) -> None:
    """One rank: its keys, and the state after ``stop_after`` batches, go to ``out``."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    workers = 0 if name == "datasets" else 1  # datasets can only save what runs in this process
    contender = CONTENDERS[name](folder, workers=workers, decode=False)
    if state and (saved := pickle.loads(state.read_bytes())["state"]) is not None:
        contender.load(saved)
    batches, found = [], None
    for batch in contender:
        batches.append(batch)
        if len(batches) == stop_after:
            found = contender.state()
            break
    out.write_bytes(pickle.dumps({"batches": batches, "state": found}))
    os._exit(0)  # several peers wait for ever for workers that are not done


def stage(name: str, folder: Path, scratch: Path, *, ranks: int, **words: Any) -> list[dict[str, Any]] | str:
    """All ranks of one stage; what each wrote, or the last line of an error."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes, outs = [], []
    for rank in range(ranks):
        outs.append(scratch / f"{words['label']}-{rank}")
        command = [sys.executable, __file__, str(folder), "--name", name, "--out", str(outs[-1])]
        if words.get("stop_after"):
            command += ["--stop-after", str(words["stop_after"])]
        if before := words.get("states"):
            command += ["--state", str(before[rank % len(before)])]
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment |= {"GLOBAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in environment.items()}
        with outs[-1].with_suffix(".err").open("w") as errors:
            processes.append(
                subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
            )
    try:
        for process in processes:
            process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} s"
    finally:
        for process in processes:  # and the workers that it has left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if all(out.exists() for out in outs):
        return [pickle.loads(out.read_bytes()) | {"path": out} for out in outs]
    lines = [line for out in outs for line in out.with_suffix(".err").read_text().splitlines()]
    return next((line for line in reversed(lines) if "Error" in line), "\n".join(lines))[:200]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"name": name, "folder": folder, "scratch": Path(scratch)}
        whole = stage(**settings, ranks=1, label="whole")
        if isinstance(whole, str):
            return {"failed": whole}
        batches = whole[0]["batches"]
        return {
            "samples": len(set(chain(*batches))),
            "same ranks": restart(settings, batches, before=1, after=1),
            "other ranks": restart(settings, batches, before=2, after=3),
        }


def restart(settings: dict[str, Any], whole: list[list[str]], *, before: int, after: int) -> dict[str, Any]:
    """Half an epoch with ``before`` ranks, the rest with ``after``; ``whole``: the batches of a whole one."""
    half = stage(**settings, ranks=before, label=f"half-{before}", stop_after=len(whole) // 2 // before)
    if isinstance(half, str):
        return {"failed": half}
    rest = stage(**settings, ranks=after, label=f"rest-{after}", states=[rank["path"] for rank in half])
    if isinstance(rest, str):
        return {"refused": rest}
    batches = [batch for ranks in (half, rest) for rank in ranks for batch in rank["batches"]]
    read, keys = list(chain(*batches)), set(chain(*whole))
    row = {"saves a state": half[0]["state"] is not None}
    row |= {"repeated": len(read) - len(set(read)), "lost": len(keys - set(read))}
    return row | ({"same order as unbroken": batches == whole} if before == after == 1 else {})


def main() -> None:
    """One contender, as JSON; with ``--out``, one rank of one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", choices=CONTENDERS, required=True)
    for name in ("--out", "--state"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop-after", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out:
        read_stage(args.name, args.folder, args.out, stop_after=args.stop_after, state=args.state)
    print(json.dumps(measure(args.name, args.folder)))


if __name__ == "__main__":
    main()
