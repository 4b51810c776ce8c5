import contextlib
import errno
import os
import subprocess
import sys
import time

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.atomic import ABANDONED, atomic_path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path):
    final = tmp_path / "new" / "clip.mp4"
    with atomic_path(final) as tmp:
        assert tmp.suffix == ".mp4"
        tmp.write_bytes(b"x" * 1000)
        (tmp.parent / "scratch").write_bytes(b"y")
        (hidden,) = names(final.parent)
        assert hidden.startswith(".") and hidden.endswith(".part")
    assert names(final.parent) == ["clip.mp4"]
    assert final.read_bytes() == b"x" * 1000


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "i/o")])
def test_a_failure_leaves_nothing_and_passes_through(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, atomic_path(tmp_path / "a.bin") as tmp:
        tmp.write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert names(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"a\.bin: the disk is full"), atomic_path(tmp_path / "a.bin") as tmp:
        tmp.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_an_existing_file_stays_unless_told(tmp_path):
    final = tmp_path / "a.bin"
    final.write_bytes(b"old")
    with pytest.raises(UserError, match="overwrite=true"), atomic_path(final):
        pytest.fail("the block must not run")
    with atomic_path(final, overwrite=True) as tmp:
        tmp.write_bytes(b"new")
        assert final.read_bytes() == b"old"
    assert final.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_target_that_appears_meanwhile_stays(tmp_path, kind):
    final = tmp_path / "a"
    with pytest.raises(UserError, match="exists already"), atomic_path(final) as tmp:
        if kind == "file":
            tmp.write_bytes(b"mine")
            final.write_bytes(b"theirs")
        else:
            tmp.mkdir()
            (tmp / "0").write_bytes(b"mine")
            final.mkdir()
            (final / "0").write_bytes(b"theirs")
    assert names(tmp_path) == ["a"]
    assert (final if kind == "file" else final / "0").read_bytes() == b"theirs"


def test_a_file_never_replaces_a_folder(tmp_path):
    final = tmp_path / "a.json"
    final.mkdir()
    (final / "dear").write_bytes(b"dear")
    with pytest.raises(UserError, match=r"a\.json: it is a folder, which no file"), atomic_path(final, True) as tmp:
        tmp.write_bytes(b"new")
    assert names(tmp_path) == ["a.json"] and names(final) == ["dear"]


@pytest.mark.parametrize(
    ("old", "new"), [("file", "file"), ("link", "file"), ("file", "folder"), ("link", "folder"), ("folder", "folder")]
)
def test_overwriting_replaces_what_a_run_has_made(tmp_path, old, new):
    final, other = tmp_path / "a", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_bytes(b"kept")
    if old == "file":
        final.write_bytes(b"old")
    elif old == "folder":
        final.mkdir()
        (final / "stale").write_bytes(b"old")
    else:
        final.symlink_to(other)
    with atomic_path(final, overwrite=True) as tmp:
        if new == "folder":
            tmp.mkdir()
            tmp = tmp / "0"
        tmp.write_bytes(b"new")
    assert (final / "0" if new == "folder" else final).read_bytes() == b"new"
    assert not final.is_symlink() and not (final / "stale").exists()
    assert names(tmp_path) == ["a", "other"] and names(other) == ["kept"]


def test_no_file_replaces_a_folder(tmp_path):
    (tmp_path / "a" / "other").mkdir(parents=True)
    with (
        pytest.raises(UserError, match="it is a folder, which no file replaces"),
        atomic_path(tmp_path / "a", True) as tmp,
    ):
        tmp.write_bytes(b"new")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["other"]


def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with atomic_path(tmp_path / "a.bin") as tmp:
        tmp.write_bytes(b"x")
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_writers_each_file_is_whole(tmp_path, overwrite):
    with contextlib.ExitStack() as stack:
        if not overwrite:
            stack.enter_context(pytest.raises(UserError, match=r"a\.bin exists already"))
        with atomic_path(tmp_path / "a.bin", overwrite) as last:
            last.write_bytes(b"last")
            with atomic_path(tmp_path / "a.bin", overwrite) as first:
                first.write_bytes(b"first")
            assert (tmp_path / "a.bin").read_bytes() == b"first"
    assert (tmp_path / "a.bin").read_bytes() == (b"last" if overwrite else b"first")
    assert names(tmp_path) == ["a.bin"]


def age(folder, seconds=ABANDONED + 60):
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    """By the next writer, which leaves those of a live one; where no lock tells, a day later."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from maxdiffusion.runtime.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as tmp:\n"
        "    tmp.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    final = tmp_path / "a.bin"
    with atomic_path(tmp_path / "alive.bin") as alive:
        assert subprocess.run([sys.executable, "-c", program, str(final)]).returncode == -9
        (left,) = set(names(tmp_path)) - {alive.parent.name}
        assert left.startswith(".") and names(tmp_path / left) == ["lock", "new.bin"]
        with atomic_path(final) as tmp:
            tmp.write_bytes(b"whole")
        assert names(tmp_path) == [alive.parent.name, "a.bin"]
        alive.write_bytes(b"whole")
    assert names(tmp_path) == ["a.bin", "alive.bin"]
    (tmp_path / "alive.bin").unlink()
    (tmp_path / left).mkdir()
    (tmp_path / left / "lock").touch()
    with atomic_path(final, overwrite=True) as tmp:
        tmp.write_bytes(b"whole")
    assert names(tmp_path) == [left, "a.bin"]
    age(tmp_path / left)
    with atomic_path(tmp_path / "b.bin") as tmp:
        tmp.write_bytes(b"whole")
    assert names(tmp_path) == ["a.bin", "b.bin"]


def test_nothing_of_others_is_removed(tmp_path):
    """A link in the place of a temporary folder must not empty the folder that it points to."""
    precious = tmp_path / "precious"
    for folder in (precious, tmp_path / ".a.bin.part", tmp_path / ".backup.part"):
        folder.mkdir()
        (folder / "dear").write_bytes(b"dear")
        age(folder)
    for link in (".b.bin.part", ".abcdefgh.part", ".b.bin.lock"):
        (tmp_path / link).symlink_to(precious)
        os.utime(tmp_path / link, (0, 0), follow_symlinks=False)
    before = names(tmp_path)
    for name in ("a.bin", "b.bin"):
        with atomic_path(tmp_path / name) as tmp:
            tmp.write_bytes(b"new")
    assert names(tmp_path) == sorted([*before, "a.bin", "b.bin"])
    assert names(precious) == names(tmp_path / ".a.bin.part") == names(tmp_path / ".backup.part") == ["dear"]


@pytest.mark.parametrize("case", ["parent is a file", "name too long"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, case):
    (tmp_path / "file").write_bytes(b"")
    final = tmp_path / "file" / "a.bin" if case == "parent is a file" else tmp_path / ("n" * 256)
    with (
        pytest.raises(UserError, match="not a folder" if case == "parent is a file" else "too long"),
        atomic_path(final),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["file"]


@pytest.fixture
def unwritable(tmp_path):
    """A folder that this user may not write to; root, who may write everywhere, becomes nobody for the test."""
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield tmp_path
    if root:
        os.seteuid(0)
    tmp_path.chmod(0o755)


def test_an_unwritable_folder_is_one_sentence(unwritable):
    with pytest.raises(UserError, match="permission denied"), atomic_path(unwritable / "a.bin"):
        pytest.fail("the block must not run")
