"""The state of a denoise run beside its results: what a later run of the same command goes on from.

Each video has a folder `.<identity>.state/` with its last two states by orbax-checkpoint: the solver's arrays after a
step, the latents of finished segments and the step cache's state, as rows of one video, whole, so that another run may
form other batches on another mesh. The identity is a digest of everything that decides the video. Of several processes,
process 0 reads and writes; it sends the arrays to the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from upath import UPath

from maxdiffusion.output import manifest, names
from maxdiffusion.request import Job, Video
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import explained
from maxdiffusion.runtime.lock import lock_of_living
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.weights.latents_io import load_latents

log = logging.getLogger(__name__)

FORMAT = 1  # of the files; a state of another format is not read
WITH_CACHE = 2  # of those that hold a step cache's log, which versions without it do not read
AUTO_SECONDS = 60.0  # checkpoint_steps=auto: seconds of work at stake
SUFFIX = ".state"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a video is denoised: its first `segment` segments whole, of the next one `step` steps.

    `cache` is what is kept of the step cache: nothing, its log, or its log and its state.
    """

    segment: int = 0
    step: int = 0
    cache: Literal["", "log", "state"] = ""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A state that was found.

    Attributes:
      progress: what it holds.
      solver: leaves of the solver's state, each with a leading axis of 1.
      done: latents of the finished segments, f h w c.
      cache: log and state of the step cache, each with a leading axis of 1, as `progress` says.
    """

    progress: Progress
    solver: tuple[np.ndarray, ...]
    done: tuple[np.ndarray, ...]
    cache: tuple[np.ndarray, ...] = ()


class States:
    """The states of a run's videos."""

    def __init__(self, job: Job, model: str) -> None:
        """`model` is the checkpoint's digest. Reads what earlier runs left."""
        self._job, self._model, self._steps = job, model, job.cfg.checkpoint_steps
        self._last = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "states")
        self._saving: Future[None] | None = None
        self._folders: dict[Video, _Folder] = {}
        self._kept: dict[Video, Sequence[str]] = {}
        self.progress: Mapping[Video, Progress] = self._find() if self._steps != 0 else {}
        self.saved: Progress | None = next(iter(self.progress.values()), None)  # the last state, here or before

    def close(self) -> None:
        """Wait for the last state to be written and free the folders."""
        self._wait()
        self._thread.shutdown()
        for folder in self._folders.values():
            folder.held.close()

    def start_from(self, kept: Mapping[Video, Sequence[str]]) -> None:
        """Let videos without a state start from finished segments: their files of latents, one for each."""
        self._kept = {video: files for video, files in kept.items() if video not in self.progress}
        self.progress = {**self.progress, **{video: Progress(len(files)) for video, files in self._kept.items()}}

    def _find(self) -> dict[Video, Progress]:
        def find() -> list[tuple[int, Any]]:
            here = set(paths.names(folder(self._job)))
            found = []
            for row, video in enumerate(self._job.videos):
                path = self._path(video)
                left = {path.name, names.lock_of(path).name} & here  # the lock alone, by a run killed before its state
                if left and (about := self._folder(video).about()):
                    found.append((row, [about["segment"], about["step"], about.get("cache", "")]))
                    log.info("%s", _describe(self._job, about))
            return found

        return {self._job.videos[row]: Progress(*at) for row, at in distributed.on_process_0(find)}

    def _folder(self, video: Video) -> _Folder:
        if video not in self._folders:
            self._folders[video] = _Folder(self._path(video), identity(self._job, video, self._model))
        return self._folders[video]

    def _path(self, video: Video) -> AnyPath:
        return folder(self._job) / f".{identity(self._job, video, self._model)}{SUFFIX}"

    def load(self, video: Video, abstract: Sequence[Any], done: Sequence[Any], cache: Sequence[Any] = ()) -> Saved:
        """The state of a video that `progress` lists, on every process.

        Args:
          video: the video.
          abstract: shape and dtype of each leaf of one video's solver state.
          done: those of the latents of its finished segments.
          cache: those of the step cache's log and state, as far as they are wanted.
        """
        zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in (*abstract, *done, *cache)]
        arrays = zeros
        if distributed.index() == 0 and video in self._kept:
            arrays = [load_latents(parse(file))[0][0] for file in self._kept[video]]
        elif distributed.index() == 0:
            arrays = self._folder(video).arrays()[: len(zeros)]
        if distributed.count() > 1:
            from jax.experimental import multihost_utils

            arrays = [np.asarray(array) for array in multihost_utils.broadcast_one_to_all(arrays)]
        parts = np.cumsum([len(abstract), len(done)])
        return Saved(
            self.progress[video],
            tuple(arrays[: parts[0]]),
            tuple(arrays[parts[0] : parts[1]]),
            tuple(arrays[parts[1] :]),
        )

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved, as process 0 has it."""
        if self._steps is None:
            return time.monotonic() - self._last >= AUTO_SECONDS
        return self._steps > 0 and step % self._steps == 0

    def save(
        self,
        videos: Sequence[Video],
        at: Progress,
        solver: Any,
        done: Sequence[np.ndarray],
        cache: Sequence[np.ndarray] = (),
    ) -> None:
        """Save the state of a batch: the first rows of all arrays are its videos'.

        `done` are latents of finished segments, b f h w c; `cache` is `Saved.cache`. The arrays are copied to the host;
        a thread writes them while the next steps are computed. A state that cannot be written is one line in the log.
        """
        leaves = [distributed.fetch(leaf) for leaf in jax.tree.leaves(solver)]
        self._last, self.saved = time.monotonic(), at
        if distributed.index():
            return
        self._wait()
        about = {"format": FORMAT, "segment": at.segment, "step": at.step, "time": time.time(), "mesh": _mesh()}
        if at.cache:
            about |= {"format": WITH_CACHE, "cache": at.cache}
        number = at.segment * 10_000 + at.step
        writes = []
        for row, video in enumerate(videos):
            arrays = [leaf[row : row + 1].copy() for leaf in leaves] + [latents[row].copy() for latents in done]
            arrays += [array[row : row + 1] for array in cache]
            writes.append((self._folder(video), arrays))
        self._saving = self._thread.submit(_write, writes, number, about)

    def remove(self, videos: Sequence[Video]) -> None:
        """Remove the states of videos that are whole."""
        self._wait()
        self.saved = None
        for video in videos:
            if (folder := self._folders.pop(video, None)) is not None:
                folder.remove()

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None


def _write(writes: Sequence[tuple[_Folder, list[np.ndarray]]], number: int, about: Mapping[str, Any]) -> None:
    for folder, arrays in writes:
        try:
            folder.save(number, arrays, about)
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = " ".join(str(error).split())[:200]
            log.warning("the state after step %d cannot be saved (%s); the run goes on", about["step"], reason)


class _Folder:
    """The states of one video, by orbax: a local folder, or archives of its steps in a bucket."""

    def __init__(self, path: AnyPath, run: str) -> None:
        self._path, self.held = path, contextlib.ExitStack()
        self._mine = self.held.enter_context(lock_of_living(names.lock_of(path), run))
        if not self._mine:
            log.warning("another run of these words is at work: this one keeps no state (%s)", path)
        self._local = path if isinstance(path, Path) else Path(self.held.enter_context(tempfile.TemporaryDirectory()))

    def about(self) -> dict[str, Any] | None:
        """The description of the newest state that can be read; older ones are said to be damaged."""
        if not self._mine:
            return None
        self._fetch()
        for number in reversed(self._numbers()):
            try:
                self._read = self._restore(number)
                if self._read[1]["format"] in (FORMAT, WITH_CACHE):
                    return self._read[1]
                log.warning("%s is of another version of this program and is not used", self._local / str(number))
            except Exception as error:  # orbax and tensorstore raise many kinds
                reason = " ".join(str(error).split())[:200]
                log.warning(
                    "the state %s is damaged (%s); the one before it is taken", self._local / str(number), reason
                )
            shutil.rmtree(self._local / str(number), ignore_errors=True)
        return None

    def arrays(self) -> list[np.ndarray]:
        """The arrays of the state that `about` describes."""
        return self._read[0]

    def _restore(self, number: int) -> tuple[list[np.ndarray], dict[str, Any]]:
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            kinds = ocp.args.Composite(state=ocp.args.PyTreeRestore(), about=ocp.args.JsonRestore())
            found = manager.restore(number, args=kinds)
        state: Mapping[str, np.ndarray] = found.state
        about = dict(found.about)
        arrays = [np.asarray(state[str(index)]) for index in range(len(state))]
        if _digest(arrays) != about["sha256"]:
            raise ValueError("its numbers are not those that were saved")
        return arrays, about

    def save(self, number: int, arrays: list[np.ndarray], about: Mapping[str, Any]) -> None:
        if not self._mine or number in self._numbers():  # an expert's last step, which ends its turn as well
            return
        import orbax.checkpoint as ocp

        with explained(self._local):
            self._local.mkdir(parents=True, exist_ok=True)
        digest = _digest(arrays)
        state = {str(index): array for index, array in enumerate(arrays)}
        kinds = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave({**about, "sha256": digest})
        )
        with self._manager() as manager:
            manager.save(number, args=kinds, force=True)
            manager.wait_until_finished()
        if not isinstance(self._path, Path):
            self._upload(self._path, number)

    def remove(self) -> None:
        if self._mine:
            shutil.rmtree(self._local, ignore_errors=True)
            for archive in self._archives().values():
                paths.remove(archive)
        self.held.close()

    @contextlib.contextmanager
    def _manager(self) -> Iterator[Any]:
        import orbax.checkpoint as ocp

        one = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, multiprocessing_options=one)
        manager = ocp.CheckpointManager(self._local.absolute(), options=options)
        try:
            yield manager
        finally:
            manager.close()

    def _numbers(self) -> list[int]:
        return sorted(int(step.name) for step in self._local.glob("*") if step.name.isdecimal())

    def _archives(self) -> dict[int, Any]:
        """The states in a bucket, `.<identity>.state/<number>.tar`."""
        if isinstance(self._path, Path):
            return {}
        found = [name for name in paths.names(self._path) if name.removesuffix(".tar").isdecimal()]
        return {int(name.removesuffix(".tar")): self._path / name for name in found}

    def _fetch(self) -> None:
        for archive in self._archives().values():
            with tempfile.TemporaryFile() as copy:
                copy.write(archive.fs.cat_file(archive.path))
                copy.seek(0)
                with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=copy) as tar:
                    tar.extractall(self._local, filter="data")

    def _upload(self, bucket: UPath, number: int) -> None:
        with tempfile.NamedTemporaryFile() as copy:
            with tarfile.open(fileobj=copy, mode="w") as tar:
                tar.add(self._local / str(number), str(number))
            copy.flush()
            paths.upload(Path(copy.name), bucket / f"{number}.tar", True)
        kept = set(self._numbers())
        for other, archive in self._archives().items():
            if other not in kept:
                paths.remove(archive)


def _digest(arrays: Sequence[np.ndarray]) -> str:
    """SHA-256 of the bytes of all arrays, one after the other."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def folder(job: Job) -> AnyPath:
    """The folder of the run's results."""
    return parse(job.cfg.save_file).parent if job.cfg.save_file else manifest.folder(job)


def identity(job: Job, video: Video, model: str) -> str:
    """16 hexadecimal digits that name a video by all that decides it; `model` is the checkpoint's digest."""
    line = manifest.digest(job, dataclasses.replace(video, drawn=False))  # by its seed, also of one that was drawn
    text = f"{line} {model} {FORMAT}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _mesh() -> str:
    return f"{jax.device_count()} {jax.devices()[0].device_kind} device{'s' * (jax.device_count() > 1)}"


def _describe(job: Job, about: Mapping[str, Any]) -> str:
    minutes = (time.time() - about["time"]) / 60
    part = f" of segment {about['segment'] + 1} of {len(job.segments)}" if len(job.segments) > 1 else ""
    return (
        f"resuming at step {about['step'] + 1} of {job.cfg.num_inference_steps}{part}, "
        f"saved {minutes:.0f} min ago on {about['mesh']}"
    )
