"""The manifest of a prompt file: a JSON file that lists its finished videos, so that a killed run goes on.

Name of the output -> digest of its line with all settings that decide the video, and the video's bytes once it is
whole. Of several processes process 0 reads and writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.media.write import FORMATS
from maxdiffusion.output import names
from maxdiffusion.request import Job, Video
from maxdiffusion.request.prompt_file import manifest_stem
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath, parse

log = logging.getLogger(__name__)


def remaining(job: Job) -> Job:
    """The same run with the videos that are not made yet, by the manifest of its prompt file; unchanged without one.

    Raises:
      UserError: a file of that name exists that came of another line, or of nothing here, and `overwrite` is false.
    """
    if job.cfg.prompts is None:
        return job

    def left() -> list[int]:
        rows = _read(job)
        return [i for i, video in enumerate(job.videos) if not _done(job, video, rows.get(_name(video), {}))]

    todo = distributed.on_process_0(left)
    if done := len(job.videos) - len(todo):
        log.info("%d of %d videos of %s are there already", done, len(job.videos), job.cfg.prompts)
    # Where processes have different files, `check_agree` says so.
    return dataclasses.replace(job, videos=tuple(job.videos[i] for i in todo if i < len(job.videos)))


def begin(job: Job, videos: Sequence[Video]) -> None:
    """From here on, files of these names are this run's."""
    _note(job, videos, lambda video: {})


def finish(job: Job, videos: Sequence[Video]) -> None:
    """The videos are whole."""
    _note(job, videos, lambda video: {"bytes": _nbytes(video_path(job, video))})


def video_path(job: Job, video: Video) -> AnyPath:
    """Where the video of a line is written."""
    return names.sibling(_folder(job) / _name(video), FORMATS[job.cfg.output_format].suffix)


def _folder(job: Job) -> AnyPath:
    return parse(job.cfg.output_dir) / job.cfg.run_name


def _name(video: Video) -> str:
    if video.output is None:
        raise ValueError("only the videos of a prompt file have names of their own")
    return video.output


def _digest(job: Job, video: Video) -> str:
    """Of the line and the settings that decide the video, with the contents of input files in place of their names."""
    line = {key: _by_content(key, value) for key, value in dataclasses.asdict(video).items()}
    settings = {
        key: _by_content(key, value)
        for key, value in job.cfg.to_json().items()
        if schema.KEYS[key].of_the_video and key not in line
    }
    return hashlib.sha256(json.dumps([line, settings], sort_keys=True).encode()).hexdigest()


def _by_content(key: str, value: Any) -> Any:
    about = schema.KEYS.get(key)
    if about is None or about.path != "input" or about.group == "model" or not value:
        return value
    return [_content(one) for one in ([value] if isinstance(value, str) else value)]


@functools.lru_cache(maxsize=1024)
def _content(location: str) -> str:
    """SHA-256 of a local file, or of a folder's files and their names; else the location itself."""
    path = parse(location)
    if not isinstance(path, Path) or not path.exists():
        return location
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file():
            digest.update(file.name.encode(errors="surrogateescape") if file != path else b"")
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _done(job: Job, video: Video, row: Mapping[str, Any]) -> bool:
    path = video_path(job, video)
    if row.get("line") == _digest(job, video):
        return path.exists() and row.get("bytes") == _nbytes(path)
    if FORMATS[job.cfg.output_format].suffix and path.is_dir():
        raise UserError(f"{path} is a folder, which no video replaces; name another output, or move the folder.")
    for other in (path, *(names.sibling(_folder(job) / _name(video), end) for end in (names.RECORD, names.LATENTS))):
        if other.exists() and not job.cfg.overwrite:
            what = "another line or other settings" if row else "another run"
            raise UserError(
                f"{other} exists already and came of {what}; name another output, remove it, or write overwrite=true."
            )
    return False


def _nbytes(path: AnyPath) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def _path(job: Job) -> AnyPath:
    return _folder(job) / f"{manifest_stem(job.cfg.prompts or '')}.json"


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


def _note(job: Job, videos: Sequence[Video], more: Callable[[Video], Mapping[str, Any]]) -> None:
    """Writes the rows of these videos, each with `more` beside its digest."""
    if job.cfg.prompts is None:
        return
    rows = {_name(video): {"line": _digest(job, video), **more(video)} for video in videos}
    text = json.dumps({**_read(job), **rows}, indent=1, ensure_ascii=False)
    with atomic_path(_path(job), overwrite=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
