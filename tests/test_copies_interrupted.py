"""merge that is killed, stopped or without room: the same command completes the same dataset."""

import shutil
import signal

import pytest
from test_copies import INLINE, build_pair, changed, codes, members, merge
from tiny_corpus import digests, killed_at

from omnidata import durable
from omnidata.builder.interruptions import BuildInterrupted
from omnidata.copier.run import copy
from omnidata.copier.settings import CopySettings
from omnidata.locks import locked
from omnidata.schema import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build_pair(tmp_path_factory.mktemp("pair"))


class Merging:
    """Something to kill while it works; as tiny_corpus.killed_at takes it."""

    def __init__(self, paths):
        self.settings = CopySettings("merge", tuple(map(str, paths)), samples_per_shard=30)

    def build(self, out, *, options=INLINE):
        return copy(self.settings, str(out), options)


def test_killed_at_any_durable_step_the_same_command_completes_the_same_dataset(pair, tmp_path):
    merging, steps, out = Merging(pair), [], tmp_path / "c"
    durable.on_step = lambda name, path: steps.append(name)
    merging.build(tmp_path / "peace")
    durable.on_step = None
    want = digests(tmp_path / "peace")
    assert len(steps) > 60
    for step in [*range(1, len(steps) - 4, 17), *range(len(steps) - 4, len(steps))]:
        assert killed_at(step, merging, out)
        merging.build(out)
        assert digests(out) == want, f"killed at step {step} of {len(steps)}"
        shutil.rmtree(out)


def test_stopped_it_says_how_to_go_on_and_goes_on_only_with_the_same_inputs(pair, tmp_path):
    own = [shutil.copytree(path, tmp_path / path.name) for path in pair]
    merging, out = Merging(own), tmp_path / "c"

    def stop(name, path):
        if name == "sync" and path == "shards/train-00001.tar":
            signal.raise_signal(signal.SIGTERM)

    durable.on_step = stop
    with pytest.raises(BuildInterrupted, match="Run the same command again"):
        merging.build(out)
    durable.on_step = None
    done = (out / "shards/train-00000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="of something else: --samples-per-shard was 30 and is 31"):
        merge(*own, out=out, samples_per_shard=31)
    changed(own[1], num_truncated=1)
    with pytest.raises(UserError, match=r"of something else: .*/b changed"):
        merging.build(out)
    changed(own[1], num_truncated=0)
    with locked(durable.Store(out), "build"), pytest.raises(UserError, match="another builder is at work"):
        merging.build(out)
    assert merging.build(out).shards_copied == 2
    assert (out / "shards/train-00000.tar").stat().st_mtime_ns == done
    merge(*pair, out=tmp_path / "peace", samples_per_shard=30)
    assert members(out) == members(tmp_path / "peace") and codes(out, deep=True) == set()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(pair, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB are to be written, 0\.0 GB are free"):
        Merging(pair).build(tmp_path / "c")
    assert not (tmp_path / "c" / "shards").exists()
    monkeypatch.undo()
    assert Merging(pair).build(tmp_path / "c").num_samples == 70


def test_a_full_disk_says_so(pair, tmp_path):
    def full(name, path):
        if name == "sync" and path.startswith("shards/val"):
            raise OSError(28, "No space left on device", path)

    durable.on_step = full
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        Merging(pair).build(tmp_path / "c")
    durable.on_step = None
    assert Merging(pair).build(tmp_path / "c").shards_copied == 1


@pytest.fixture(autouse=True)
def no_steps():
    yield
    durable.on_step = None
