import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from v4train.data.cache import MANIFEST, cached_folder, is_whole
from v4train.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Builder:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "a").write_text("content")
        (folder / "b").write_bytes(b"\0" * 1000)


def test_built_once_then_found(tmp_path):
    build = Builder()
    first = cached_folder(tmp_path / "new" / "cache", "thing", build)
    assert cached_folder(tmp_path / "new" / "cache", "thing", build) == first
    assert build.calls == 1
    assert sorted(p.name for p in first.iterdir()) == ["a", "b", MANIFEST]
    assert (first / "a").read_text() == "content"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "torn manifest"])
def test_damaged_folder_is_built_again(tmp_path, caplog, damage):
    build = Builder()
    folder = cached_folder(tmp_path, "thing", build)
    match damage:
        case "truncated":
            (folder / "b").write_bytes(b"\0" * 999)
        case "flipped":
            (folder / "a").write_text("Content")
        case "missing":
            (folder / "a").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "torn manifest":
            (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])
    assert not is_whole(folder)
    with caplog.at_level(logging.WARNING, "v4train"):
        cached_folder(tmp_path, "thing", build)
    assert build.calls == 2 and is_whole(folder)
    assert "damaged" in caplog.text


def test_what_a_killed_writer_left_is_not_used(tmp_path):
    """A process that dies in the middle of its work, as by SIGKILL: no clean-up runs."""
    program = (
        "import os, sys\nfrom v4train.data.cache import cached_folder\n"
        "def build(folder):\n (folder / 'a').write_text('half'); os._exit(9)\n"
        "cached_folder(sys.argv[1], 'thing', build)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, cwd=ROOT).returncode == 9
    assert list(tmp_path.glob("thing.tmp-*"))
    folder = cached_folder(tmp_path, "thing", Builder())
    assert (folder / "a").read_text() == "content"
    assert not list(tmp_path.glob("thing.tmp-*"))


def test_a_failing_builder_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "a").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_folder(tmp_path, "thing", build)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]
    assert cached_folder(tmp_path, "thing", Builder()).is_dir()  # the lock was let go


def test_cache_dir_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^tokenizer.cache_dir=.*file/cache") as error:
        cached_folder(tmp_path / "file" / "cache", "thing", Builder())
    assert "\n" not in str(error.value)


def test_manifest_is_json_of_digests(tmp_path):
    folder = cached_folder(tmp_path, "thing", Builder())
    assert json.loads((folder / MANIFEST).read_text())["a"] == hashlib.sha256(b"content").hexdigest()
