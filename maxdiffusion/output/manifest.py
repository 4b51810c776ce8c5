"""The manifest of a prompt file: a JSON file beside the videos that lists the finished ones, so that runs can resume.

It maps the name of an output to the digest of its line with all settings that decide the video, and to the video's
bytes once it is whole. Of several processes, process 0 reads and writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxdiffusion.config import Config, schema
from maxdiffusion.errors import UserError
from maxdiffusion.output import names
from maxdiffusion.request import Job, Video
from maxdiffusion.request.prompt_file import manifest_stem
from maxdiffusion.request.videos import LISTS
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.atomic import explained, write_json
from maxdiffusion.runtime.lock import try_lock
from maxdiffusion.runtime.paths import AnyPath, is_url, parse

log = logging.getLogger(__name__)

_PATIENCE = 120  # seconds; the lock of a run that was killed is free before (`lock.EXPIRY`)


def remaining(job: Job) -> Job:
    """Leave out the videos that the manifest of the run's prompt file lists as finished; `job` itself without one.

    Raises:
      UserError: a file of an output's name exists that came of another line or run, and `overwrite` is false.
    """
    if job.cfg.prompts is None:
        return job

    def left() -> list[int]:
        rows = _read(job)
        return [i for i, video in enumerate(job.videos) if not _done(job, video, rows.get(str(video.output), {}))]

    todo = distributed.on_process_0(left)
    if done := len(job.videos) - len(todo):
        log.info("%d of %d videos of %s exist already", done, len(job.videos), job.cfg.prompts)
    # Where processes have different files, `check_agree` fails.
    return dataclasses.replace(job, videos=tuple(job.videos[i] for i in todo if i < len(job.videos)))


def begin(job: Job, videos: Sequence[Video]) -> None:
    """List videos before their first file is written: files of these names belong to this run."""
    _write(job, videos, lambda video: {})


def begun(job: Job) -> set[str]:
    """The outputs of these lines that a run has begun and not listed as finished."""
    rows = _read(job)
    return {str(video.output) for video in job.videos if rows.get(str(video.output)) == {"line": digest(job, video)}}


def finish(job: Job, videos: Sequence[Video]) -> None:
    """List videos as finished."""
    _write(job, videos, lambda video: {"bytes": _nbytes(video_path(job, video))})


def folder(job: Job) -> AnyPath:
    """The folder of all files that are not named by `save_file`."""
    return parse(job.cfg.output_dir) / job.cfg.run_name


def video_path(job: Job, video: Video) -> AnyPath:
    """The video file of a prompt file's line."""
    return folder(job) / f"{video.output}{job.suffix}"


def besides(job: Job) -> tuple[str, ...]:
    """The suffixes of the files beside each video."""
    latents = () if job.cfg.decode_latents else (names.LATENTS,)
    sheet = (names.SHEET,) if job.cfg.contact_sheet and job.cfg.num_frames > 1 else ()
    return (names.RECORD, *latents, *sheet)


def digest(job: Job, video: Video) -> str:
    """SHA-256 of the line and the settings that decide the video; of input files their contents count, not names."""
    line = {key: _by_content(key, value) for key, value in dataclasses.asdict(video).items()}
    if line.pop("drawn"):
        line["seed"] = -1  # as it was asked for
    others = {key: value for key, value in settings(job.cfg).items() if key not in line}
    return hashlib.sha256(json.dumps([line, others], sort_keys=True).encode()).hexdigest()


def settings(cfg: Config) -> dict[str, Any]:
    """The settings that decide the videos, of input files their contents, without the prompt file."""
    keys = {key for key, about in schema.KEYS.items() if about.of_the_video or key in LISTS}
    return {key: _by_content(key, value) for key, value in cfg.to_json().items() if key in keys}


def _by_content(key: str, value: Any) -> Any:
    about = schema.KEYS.get(key)
    if isinstance(value, dict) and about and about.path == "input":
        return [[_content(location), strength] for location, strength in value.items()]
    if about is None or about.path != "input" or about.group == "model" or not value:
        return value
    return [_content(one) for one in ([value] if isinstance(value, str) else value)]


def _content(location: str) -> str:
    """SHA-256 of a local file, or of a folder's files and their names; `location` itself for anything else."""
    if is_url(location):
        return location
    path = parse(location)
    return _sha256(path, path.stat().st_mtime_ns) if isinstance(path, Path) and path.exists() else location


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, changed: int) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(b"" if file == path else file.name.encode(errors="surrogateescape"))
        with open(str(file), "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _done(job: Job, video: Video, row: Mapping[str, Any]) -> bool:
    path = video_path(job, video)
    if row.get("line") == digest(job, video):
        return path.exists() and row.get("bytes") == _nbytes(path)
    if job.suffix and path.is_dir():
        raise UserError(f"{path} is a folder, which no video replaces; name another output, or move the folder.")
    for other in (path, *(folder(job) / f"{video.output}{ending}" for ending in besides(job))):
        if other.exists() and not job.cfg.overwrite:
            what = "another line or other settings" if row else "another run"
            raise UserError(
                f"{other} exists already and came of {what}; name another output, remove it, or write overwrite=true."
            )
    return False


def _nbytes(path: AnyPath) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: AnyPath) -> list[AnyPath]:
    """The file itself, or the files of a folder."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _path(job: Job) -> AnyPath:
    return folder(job) / f"{manifest_stem(job.cfg.prompts or '')}.json"


def _read(job: Job) -> dict[str, dict[str, Any]]:
    path = _path(job)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to make all its videos again.") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path} is not a manifest; remove it, or rename the prompt file.")
    return rows


def _write(job: Job, videos: Sequence[Video], more: Callable[[Video], Mapping[str, Any]]) -> None:
    """Write the rows of these videos, each with `more` beside its digest."""
    if job.cfg.prompts is None or not videos:
        return
    rows = {str(video.output): {"line": digest(job, video), **more(video)} for video in videos}
    path = _path(job)
    with _locked(path):
        write_json(path, {**_read(job), **rows}, overwrite=True)


@contextlib.contextmanager
def _locked(path: AnyPath) -> Iterator[None]:
    """Keep the rows of other runs, which may write the same manifest: one run at a time reads and rewrites it."""
    lock, deadline = names.lock_of(path), time.monotonic() + _PATIENCE
    with contextlib.ExitStack() as stack:
        with explained(path):
            while not stack.enter_context(try_lock(lock)):
                if time.monotonic() > deadline:
                    raise UserError(f"another run is writing {path}; wait, or delete {lock} if that run was killed")
                time.sleep(0.05)
        yield
