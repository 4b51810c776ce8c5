"""What of a prompt file is done: a JSON file beside the videos, so that a run that was killed goes on.

Name of the output -> digest of its line with all settings that the video follows from, and the video's bytes once it is
whole. Of several processes the first reads and writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from maxdiffusion.config import Config, prompt_file, schema
from maxdiffusion.config.examples import Example
from maxdiffusion.errors import UserError
from maxdiffusion.media import naming
from maxdiffusion.media.write import FORMATS
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath, parse

log = logging.getLogger(__name__)

# The groups of keys that a video follows from, and not how or where it is made. Its line is in the Example.
_GROUPS = {"model", "video", "sampling", "control", "dtypes"}
_HOW = {"inspect", "guidance_mode", "loop", "expert_residency"}  # what a run that met too little memory may change
_KEYS = {key for key, group, _, _ in schema.rows() if group in _GROUPS} - {"width", "height"} - _HOW | {"output_format"}


def remaining(cfg: Config, videos: Sequence[Example]) -> tuple[Example, ...]:
    """Those that are not done, by the manifest of the prompt file; all where there is no such file.

    Raises:
      UserError: a file of that name exists that came of another line, or of nothing here, and `overwrite` is false.
    """
    if cfg.prompts is None:
        return tuple(videos)

    def open_ones() -> list[int]:
        rows = _read(cfg)
        return [i for i, video in enumerate(videos) if not _done(cfg, video, rows.get(_name(video), {}))]

    todo = distributed.first(open_ones)
    if len(todo) < len(videos):
        log.info("%d of %d videos of %s are there already", len(videos) - len(todo), len(videos), cfg.prompts)
    return tuple(videos[i] for i in todo if i < len(videos))  # where processes have different files, `agree` says so


def begin(cfg: Config, videos: Sequence[Example]) -> None:
    """From here on, files of these names are this run's."""
    _note(cfg, {_name(video): {"line": _digest(cfg, video)} for video in videos})


def finish(cfg: Config, videos: Sequence[Example]) -> None:
    """The videos are whole."""
    _note(cfg, {_name(v): {"line": _digest(cfg, v), "bytes": _nbytes(video_path(cfg, v))} for v in videos})


def video_path(cfg: Config, video: Example) -> AnyPath:
    """Where the video of a line is written."""
    return naming.sibling(parse(cfg.output_dir) / cfg.run_name / _name(video), FORMATS[cfg.output_format].suffix)


def _name(video: Example) -> str:
    if video.output is None:
        raise ValueError("only the videos of a prompt file have names of their own")
    return video.output


def _digest(cfg: Config, video: Example) -> str:
    settings = {key: value for key, value in cfg.to_json().items() if key in _KEYS}
    text = json.dumps([dataclasses.asdict(video), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _done(cfg: Config, video: Example, row: Mapping[str, Any]) -> bool:
    path = video_path(cfg, video)
    if row.get("line") == _digest(cfg, video):
        return path.exists() and row.get("bytes") == _nbytes(path)
    if FORMATS[cfg.output_format].suffix and path.is_dir():
        raise UserError(f"{path} is a folder, which no video replaces; name another output, or move the folder.")
    stem = parse(cfg.output_dir) / cfg.run_name / _name(video)
    for other in (path, *(naming.sibling(stem, suffix) for suffix in (naming.RECORD, naming.LATENTS))):
        if other.exists() and not cfg.overwrite:
            what = "another line or other settings" if row else "another run"
            raise UserError(
                f"{other} exists already and came of {what}; name another output, remove it, or write overwrite=true."
            )
    return False


def _nbytes(path: AnyPath) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


def _path(cfg: Config) -> AnyPath:
    return parse(cfg.output_dir) / cfg.run_name / f"{prompt_file.manifest_stem(cfg.prompts or '')}.json"


def _read(cfg: Config) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(_path(cfg).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{_path(cfg)} cannot be read ({error}); remove it to make all its videos again.") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{_path(cfg)} is no manifest; remove it, or rename the prompt file.")
    return rows


def _note(cfg: Config, rows: Mapping[str, Mapping[str, Any]]) -> None:
    if cfg.prompts is None:
        return
    text = json.dumps({**_read(cfg), **rows}, indent=1, ensure_ascii=False)
    with atomic_path(_path(cfg), overwrite=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
