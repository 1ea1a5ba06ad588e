"""Run recipes on several processes of this machine: a fork server imports torch once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipelines.train"])


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process of its own that runs ``function``."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run_recipes(paths: Sequence[Path], overrides: Sequence[str] = ()) -> None:
    """Train one recipe after the other in this process, as ``train.py`` does."""
    from pipelines.config import load_recipe
    from pipelines.train import train

    for path in paths:
        train(load_recipe(path, overrides))


def run_on_ranks(size: int, paths: Sequence[Path]) -> None:
    """Train the recipes on ``size`` ranks, with the environment that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start(_one_rank, rank, size, port, list(paths)) for rank in range(size)]
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, codes


def _one_rank(rank: int, size: int, port: int, paths: Sequence[Path]) -> None:
    from pipelines.config import load_recipe
    from pipelines.train import train

    for number, path in enumerate(paths):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port + number)}
        train(load_recipe(path))
