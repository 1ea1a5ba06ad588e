"""Object stores: corpus, pictures and dataset in S3, over the wire (moto's server stands in for Amazon's)."""

import os
import subprocess
import sys

import pytest
from tiny_corpus import digests, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("s3") / "c", num_llava=20, num_chat=10, bad=False)


@pytest.fixture(scope="module")
def s3():
    """A file system of an empty S3, which child processes reach by their environment."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        yield fsspec.filesystem("s3", skip_instance_cache=True)
    finally:
        patch.undo()
        server.stop()


def build_shards(folder, image_root, out):
    """Run the command with two workers; the completed process."""
    command = [sys.executable, "-m", "omnidata.cli", "build-shards"]
    command += [f"{folder}/llava.json", f"{folder}/chat.jsonl", "--image-root", image_root, "--out", out]
    command += ["--num-query", "4", "--image-size", "32", "--samples-per-shard", "15", "--quiet"]
    command += ["--tokenizer", os.environ["TOKENIZER"], "--workers", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_everything_in_s3_gives_the_same_shards(corpus, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZER", str(corpus.folder / "tokenizer"))
    s3.mkdir("raw")
    s3.mkdir("made")
    for name in ("llava.json", "chat.jsonl"):
        s3.put_file(str(corpus.folder / name), f"raw/{name}")
    for photo in (corpus.folder / "photos").iterdir():
        s3.put_file(str(photo), f"raw/photos/{photo.name}")
    here = build_shards(corpus.folder, str(corpus.folder / "photos"), str(tmp_path / "data"))
    there = build_shards("s3://raw", "s3://raw/photos", "s3://made/data")
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    s3.invalidate_cache()
    names = {path.removeprefix("made/data/") for path in s3.find("made/data")}
    expected = digests(tmp_path / "data")
    assert names == set(expected)
    for name in expected:
        if name.startswith(("shards/", "tokenizer/")):
            assert s3.cat_file(f"made/data/{name}") == (tmp_path / "data" / name).read_bytes(), name

    from omnidata.dataset import Dataset

    assert len(Dataset("s3://made/data")) == 30
    assert Dataset("s3://made/data")[3].images == Dataset(tmp_path / "data")[3].images
    verify = [sys.executable, "-m", "omnidata.cli", "verify", "s3://made/data", "--deep"]
    assert subprocess.run(verify, capture_output=True, timeout=120).returncode == 0


def test_a_second_build_to_the_same_place_is_refused(corpus, s3, monkeypatch):
    monkeypatch.setenv("TOKENIZER", str(corpus.folder / "tokenizer"))
    refused = build_shards(corpus.folder, str(corpus.folder / "photos"), "s3://made/data")
    assert refused.returncode == 1 and "already holds a complete dataset" in refused.stderr
