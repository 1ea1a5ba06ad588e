"""Ray: the same events and the same bytes, on a cluster of this machine."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_executors import die_until, double, fail
from tiny_corpus import digests, write_corpus

from omnidata.builder.settings import RunOptions
from omnidata.executors import WorkerDiedError, run_tasks
from omnidata.ray_executor import RayExecutor
from omnidata.schema import UserError

SCRIPT = Path(__file__).parents[1] / "pipelines" / "cluster" / "build-shards.ray.sh"


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))  # workers import this file
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield ray
    ray.shutdown()


def test_ray_runs_tasks_and_survives_a_killed_worker(local_ray, tmp_path):
    executor = RayExecutor(double, num_workers=2)
    assert dict(run_tasks(executor, range(1, 8))) == {task: 2 * task for task in range(1, 8)}
    executor.close()
    assert local_ray.is_initialized(), "a cluster that was there before is left as it was"

    executor = RayExecutor(die_until, num_workers=2)
    tasks = [(str(tmp_path / "once"), 1), (str(tmp_path / "healthy"), 0)]
    assert dict(run_tasks(executor, tasks)) == {tasks[0]: 2, tasks[1]: 1}
    with pytest.raises(WorkerDiedError, match="3 times"):
        list(run_tasks(executor, [(str(tmp_path / "always"), 99)]))
    executor.close()

    executor = RayExecutor(fail, num_workers=2)
    with pytest.raises(UserError, match="no such corpus"):
        list(run_tasks(executor, [UserError("no such corpus")]))
    executor.close()


def test_ray_builds_the_same_bytes(local_ray, tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=12, num_chat=8, bad=False)
    corpus.build(tmp_path / "here", options=RunOptions(executor="inline", quiet=True), samples_per_shard=10)
    corpus.build(tmp_path / "ray", options=RunOptions(executor="ray", quiet=True), samples_per_shard=10)
    assert digests(tmp_path / "ray") == digests(tmp_path / "here")


def test_relative_paths_start_where_the_build_was_started(local_ray, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "c", num_llava=6, num_chat=4, bad=False)
    corpus.build(tmp_path / "here", options=RunOptions(executor="inline", quiet=True))
    monkeypatch.chdir(tmp_path)
    source = tuple(os.path.relpath(name) for name in corpus.settings.source)
    options = RunOptions(executor="ray", quiet=True)
    corpus.build("there", options=options, source=source, image_root="c/photos")
    shards = {name: digest for name, digest in digests(tmp_path / "here").items() if name.endswith(".tar")}
    assert shards.items() <= digests(tmp_path / "there").items()

    executor = RayExecutor(double, num_workers=1, folder="/nowhere")
    with pytest.raises(UserError, match="has no /nowhere, where relative paths start"):
        list(run_tasks(executor, [1]))
    executor.close()


def test_the_cluster_script_builds(local_ray, tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=6, num_chat=4, bad=False)
    settings = replace(corpus.settings, samples_per_shard=5)
    lines = [f"source: [{', '.join(settings.source)}]", f"tokenizer: {settings.tokenizer}", "num-query: 4"]
    lines += [f"image-root: {settings.image_root}", f"out: {tmp_path / 'data'}", "samples-per-shard: 5"]
    (tmp_path / "build.yaml").write_text("\n".join(lines))
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    address = local_ray.get_runtime_context().gcs_address
    environment = os.environ | {"PATH": path, "RAY_ADDRESS": address}
    command = ["bash", str(SCRIPT), str(tmp_path / "build.yaml")]
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "data" / "manifest.json").exists()
