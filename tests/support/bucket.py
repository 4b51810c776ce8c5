"""A bucket below a folder, which takes gs://'s place: an object appears when its upload ends, or must be new."""

import io
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import pytest


class _Upload(io.BytesIO):
    def __init__(self, bucket, path):
        super().__init__()
        self._end = lambda data: bucket.pipe_file(path, data)

    def close(self):
        if not self.closed:
            self._end(self.getvalue())
        super().close()


class Bucket(fsspec.AbstractFileSystem):
    """Below `root`; counts the ranges that are read, and raises `failure` instead of taking an upload."""

    protocol = ("gs", "gcs")
    cachable = False
    root = Path()
    reads = at_once = most_at_once = 0
    failure = None
    lock = threading.Lock()

    def _file(self, path):
        return self.root / self._strip_protocol(path)

    def info(self, path, **kwargs):
        file = self._file(path)
        size = file.stat().st_size
        return {
            "name": self._strip_protocol(path),
            "size": size,
            "type": "directory" if file.is_dir() else "file",
        }

    def ls(self, path, detail=True, **kwargs):
        file, path = self._file(path), self._strip_protocol(path)
        found = [f"{path}/{name}" for name in os.listdir(file)] if file.is_dir() else [path]
        return [self.info(name) for name in found] if detail else found

    def cat_file(self, path, start=None, end=None, **kwargs):
        with self.lock:
            Bucket.reads += 1
            Bucket.at_once += 1
            Bucket.most_at_once = max(Bucket.most_at_once, Bucket.at_once)
        time.sleep(0.002)
        try:
            return self._file(path).read_bytes()[start:end]
        finally:
            with self.lock:
                Bucket.at_once -= 1

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        file = self._file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root.parent) as whole:
            (Path(whole) / "new").write_bytes(value)
            (os.link if mode == "create" else os.replace)(Path(whole) / "new", file)

    def put_file(self, lpath, rpath, mode="overwrite", **kwargs):
        if self.failure:
            raise self.failure
        self.pipe_file(rpath, Path(lpath).read_bytes(), mode)

    def _open(self, path, mode="rb", **kwargs):
        return _Upload(self, path) if "w" in mode else self._file(path).open("rb")

    def rm_file(self, path):
        self._file(path).unlink()

    def makedirs(self, path, exist_ok=False):
        bucket = self._strip_protocol(path).partition("/")[0]
        assert (self.root / bucket).is_dir(), f"this would create the bucket {bucket}"


def register(root: Path) -> None:
    Bucket.root = root
    for scheme in Bucket.protocol:
        fsspec.register_implementation(scheme, Bucket, clobber=True)


@pytest.fixture
def bucket(tmp_path):
    register(tmp_path / "buckets")
    Bucket.reads = Bucket.most_at_once = 0
    Bucket.failure = None
    yield Bucket
    for scheme in Bucket.protocol:
        sys.modules["fsspec.registry"]._registry.pop(scheme)
