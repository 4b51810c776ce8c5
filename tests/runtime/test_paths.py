"""Stores of objects in this process: fsspec's memory://, and one below a folder that takes gs://'s place."""

import contextlib
import errno
import importlib.util
import os
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from maxdiffusion.errors import UserError
from maxdiffusion.output import names as naming
from maxdiffusion.runtime import lock, paths
from maxdiffusion.runtime.atomic import atomic_path
from tests.support.bucket import Bucket, bucket

__all__ = ["bucket"]  # a fixture


@pytest.fixture(params=["memory://below", "gs://bucket/below"])
def folder(request, bucket) -> UPath:
    MemoryFileSystem.store.clear()
    found = paths.parse(request.param)
    assert isinstance(found, UPath)
    return found


def test_a_path_here_is_a_path(tmp_path):
    assert paths.parse("a/b") == Path("a/b") and paths.parse("file:///a/b") == Path("/a/b")
    assert isinstance(paths.parse("file:///a"), Path)


def test_what_cannot_be_reached_is_one_sentence(monkeypatch, bucket):
    with pytest.raises(UserError, match="nose://a has an unknown scheme"):
        paths.parse("nose://a")
    monkeypatch.setattr(Bucket, "exists", lambda self, path: 1 / 0)
    with pytest.raises(UserError, match=r"gs://a/b cannot be reached \(division by zero\); check the name"):
        paths.probe("gs://a/b")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_store_whose_package_is_missing():
    with pytest.raises(UserError, match=r"gs://a/b needs a package .*: pip install 'maxdiffusion\[gcs\]'"):
        paths.parse("gs://a/b")


def test_nothing_is_visible_before_it_is_whole(folder):
    final = folder / "a.bin"
    with atomic_path(final) as temporary:
        temporary.write_bytes(b"half")
        assert paths.names(folder) == []
        temporary.write_bytes(b"whole")
    assert final.read_bytes() == b"whole" and paths.names(folder) == ["a.bin"]


def test_an_existing_object_stays_unless_told(folder):
    final = folder / "a.bin"
    final.fs.pipe_file(final.path, b"old")
    with pytest.raises(UserError, match=r"a\.bin exists already"), atomic_path(final) as temporary:
        temporary.write_bytes(b"new")
    assert final.read_bytes() == b"old" and paths.names(folder) == ["a.bin"]
    with atomic_path(final, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert final.read_bytes() == b"new" and paths.names(folder) == ["a.bin"]


@pytest.mark.parametrize("failure", [RuntimeError("403 Forbidden"), OSError(errno.EACCES, "no")])
def test_a_refused_upload_is_one_sentence(bucket, failure):
    bucket.failure = failure
    said = pytest.raises(UserError, match=r"cannot write gs://bucket/a\.bin: (403 Forbidden|permission denied)")
    with said, atomic_path(paths.parse("gs://bucket/a.bin")) as temporary:
        temporary.write_bytes(b"x")
    assert not list(bucket.root.rglob("*"))


def test_names_are_held(folder):
    with naming.reserve(folder, "clip") as first, naming.reserve(folder, "clip") as second:
        assert (first.name, second.name) == ("clip", "clip-2")
        naming.sibling(first, ".mp4").fs.pipe_file(naming.sibling(first, ".mp4").path, b"x")
    with naming.reserve(folder, "clip") as third:
        assert third.name == "clip-2"
    assert paths.names(folder) == ["clip.mp4"]
    with naming.reserve_file(folder / "new.mp4", (".mp4", ".json")) as stem:
        assert str(stem) == str(folder / "new")
        said = pytest.raises(UserError, match=r"another run is making .*new\.mp4.*or delete .*\.new\.lock")
        with said, naming.reserve_file(folder / "new.mp4", (".mp4", ".json")):
            pass
    with (
        pytest.raises(UserError, match=r"clip\.mp4 exists already"),
        naming.reserve_file(folder / "clip.mp4", (".mp4",)),
    ):
        pass


def test_a_reservation_of_a_killed_run_ends_by_itself(folder, monkeypatch):
    left, video = folder / ".clip.lock", folder / "clip.mp4"
    with naming.reserve_file(video, (".mp4",)):
        host, _, *others = left.read_bytes().split(b" ")[1:]
    content = b" ".join([b"maxdiffusion", host, b"7/7/another-machine", *others])
    left.fs.pipe_file(left.path, content)  # as a run leaves it that is killed now
    with pytest.raises(UserError, match="another run is making"), naming.reserve_file(video, (".mp4",)):
        pytest.fail("the block must not run")
    monkeypatch.setattr(lock, "EXPIRY", -1)  # and later
    with naming.reserve_file(video, (".mp4",)) as stem:
        assert stem.name == "clip" and left.read_bytes() != content
    assert paths.names(folder) == []


def test_the_reservation_of_a_process_of_this_machine_ends_with_it(folder):
    left, video = folder / ".clip.lock", folder / "clip.mp4"
    with naming.reserve_file(video, (".mp4",)):
        content = left.read_bytes()
    number, *others = content.split(b" ")[2].split(b"/")
    assert int(number) == os.getpid()
    left.fs.pipe_file(left.path, content)
    with pytest.raises(UserError, match="another run is making"), naming.reserve_file(video, (".mp4",)):
        pytest.fail("the block must not run")
    dead = content.replace(b"/".join([number, *others]), b"/".join([number, b"1", *others[1:]]))  # of its number before
    left.fs.pipe_file(left.path, dead)
    with naming.reserve_file(video, (".mp4",)):
        pass
    assert paths.names(folder) == []


@pytest.mark.parametrize("renewed", [False, True])
def test_a_run_waits_for_its_own_dead_reservation_and_not_for_a_living_one(folder, monkeypatch, caplog, renewed):
    left, video = folder / ".clip.lock", folder / "clip.mp4"
    theirs = b"maxdiffusion host 7/7/another-machine 00 the-run %d\n"
    left.fs.pipe_file(left.path, theirs % time.time())
    monkeypatch.setattr(lock, "EXPIRY", 3)
    monkeypatch.setattr(lock, "RENEWAL", 60)
    renewal = threading.Timer(1, lambda: left.fs.pipe_file(left.path, theirs % (time.time() + 60)))
    if renewed:
        renewal.start()
    said = pytest.raises(UserError, match="another run is making") if renewed else contextlib.nullcontext()
    with said, naming.reserve_file(video, (".mp4",), run="the-run"):
        assert not renewed
    renewal.cancel()
    assert paths.names(folder) == ([".clip.lock"] if renewed else [])


def test_parts_of_an_object_come_in_order_and_several_at_once(bucket):
    path = paths.parse("gs://bucket/data")
    path.fs.pipe_file(path.path, bytes(range(200)))
    read = paths.ahead(lambda at: paths.read(path, at, at + 5), range(0, 200, 5))
    assert b"".join(read) == bytes(range(200))
    assert bucket.reads == 40 and 2 <= bucket.most_at_once <= 8


def test_ahead_is_never_far_ahead_and_passes_errors_on():
    begun = []
    results = paths.ahead(lambda item: begun.append(item) or item, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert max(begun) < 20
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(paths.ahead(lambda item: 1 / item, [1, 0]))


def test_a_copy_for_libraries_that_know_only_this_machine(folder, tmp_path):
    for name in ("a.json", "b.txt"):
        (folder / name).fs.pipe_file((folder / name).path, name.encode())
    with paths.local(folder) as here:
        assert sorted(entry.read_bytes() for entry in here.iterdir()) == [b"a.json", b"b.txt"]
    assert not here.exists()
    with paths.local(tmp_path) as here:
        assert here == tmp_path
