"""Locks here and in a bucket, of live, killed and stopped owners."""

import contextlib
import errno
import fcntl
import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest

from maxdiffusion.runtime import lock, paths
from maxdiffusion.runtime.lock import try_lock
from tests.support.bucket import bucket

__all__ = ["bucket"]  # a fixture


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def path(request, tmp_path, bucket):
    """A lock file here and one in a bucket, whose folder here is the second value."""
    if request.param == "here":
        return tmp_path / ".x.lock", tmp_path
    (bucket.root / "b").mkdir(parents=True)
    return paths.parse("gs://b/.x.lock"), bucket.root / "b"


everywhere = pytest.mark.parametrize("path", ["here", "bucket"], indirect=True)


@everywhere
def test_one_holds_it_and_nothing_is_left(path):
    path, folder = path
    with try_lock(path) as first, try_lock(path) as second:
        assert first and not second
        assert (folder / ".x.lock").read_bytes().startswith(b"maxdiffusion ")
    with try_lock(path) as third:
        assert third
    assert not (folder / ".x.lock").exists()
    with contextlib.suppress(KeyError), try_lock(path):
        raise KeyError
    assert not (folder / ".x.lock").exists()


def test_of_many_threads_one_holds_it(tmp_path):
    inside, most, held = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, held
        for _ in range(200):
            with try_lock(tmp_path / ".x.lock") as mine:
                if not mine:
                    continue
                with guard:
                    inside, held = inside + 1, held + 1
                    most = max(most, inside)
                assert (tmp_path / ".x.lock").is_file()
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and held > 0
    assert names(tmp_path) == []


def test_without_locks_the_first_has_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with try_lock(tmp_path / "x") as first, try_lock(tmp_path / "x") as second:
        assert first and not second
    assert names(tmp_path) == []


OWNER = """
import sys, time
from pathlib import Path
from tests.support.bucket import register
from maxdiffusion.runtime import lock, paths
register(Path(sys.argv[1]))
lock.RENEWAL = 0.1
with lock.try_lock(paths.parse(sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@everywhere
def test_that_of_a_killed_owner_is_taken_over(path, bucket, monkeypatch):
    path, folder = path
    monkeypatch.setattr(lock, "EXPIRY", 3)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, bucket.root, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "True\n"
    time.sleep(0 if path == folder / ".x.lock" else 5)  # longer than an object lives that is not renewed
    with try_lock(path) as mine:
        assert not mine
    owner.kill()
    owner.communicate()
    assert names(folder).count(".x.lock") == 1
    mine, waited = False, time.monotonic()
    while not mine and time.monotonic() - waited < 10:
        with try_lock(path) as mine:
            pass
    assert mine and ".x.lock" not in names(folder)


def test_of_many_that_find_a_dead_owner_one_takes_over(bucket):
    (bucket.root / "b").mkdir(parents=True)
    (bucket.root / "b" / "x").write_bytes(b"maxdiffusion somewhere 1 0a 1700000000\n")
    barrier, held = threading.Barrier(4), []

    def work():
        with try_lock(paths.parse("gs://b/x")) as mine:
            held.append(mine)
            barrier.wait(30)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held) == [False, False, False, True]
    assert names(bucket.root / "b") == []


def test_an_owner_that_was_stopped_removes_nothing_of_its_successor(bucket, monkeypatch):
    (bucket.root / "b").mkdir(parents=True)
    monkeypatch.setattr(lock, "RENEWAL", 60)
    monkeypatch.setattr(lock, "EXPIRY", 1)
    path = paths.parse("gs://b/x")
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(try_lock(path))
        time.sleep(2.5)
        successor = stack.enter_context(contextlib.ExitStack())
        assert successor.enter_context(try_lock(path))
        kept = successor.pop_all()
    assert names(bucket.root / "b") == ["x"]
    kept.close()
    assert names(bucket.root / "b") == []


def test_a_lock_that_cannot_be_removed_fails_no_run(tmp_path, bucket, monkeypatch):
    def refuse(*_):
        raise RuntimeError("503")

    monkeypatch.setattr(bucket, "rm_file", refuse)
    with try_lock(paths.parse("gs://b/x")) as mine:
        assert mine
    with try_lock(tmp_path / "gone" / "x") as mine:
        assert mine
        shutil.rmtree(tmp_path / "gone")


def test_a_full_disk_leaves_no_lock(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"), try_lock(tmp_path / "x"):
            pytest.fail("the block must not run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "link to a file", "dangling link", "file", "object"])
def test_what_is_not_a_lock_stays_as_it_is(tmp_path, bucket, kind):
    """A link must neither be followed nor removed, nor a file of somebody else be emptied."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "dear").write_bytes(b"")
    path = tmp_path / ".x.lock"
    if kind == "folder":
        path.mkdir()
        (path / "dear").write_bytes(b"dear")
    elif kind == "file":
        path.write_bytes(b"dear")
    elif kind == "object":
        path = paths.parse("gs://b/.x.lock")
        path.fs.pipe_file(path.path, b"dear")
    else:
        path.symlink_to({"link to a folder": precious, "link to a file": precious / "dear"}.get(kind, tmp_path / "no"))
    before = sorted(tmp_path.rglob("*"))
    with try_lock(path) as mine:
        assert not mine
    assert sorted(tmp_path.rglob("*")) == before and (precious / "dear").read_bytes() == b""
    if kind in ("file", "object"):
        assert path.read_bytes() == b"dear"


def test_what_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError), try_lock(tmp_path / "file" / "x"):
        pytest.fail("the block must not run")
    with pytest.raises(OSError, match="too long"), try_lock(tmp_path / ("n" * 256)):
        pytest.fail("the block must not run")
