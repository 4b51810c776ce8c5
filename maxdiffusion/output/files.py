"""The files of one batch of videos: names held from the first write to the last, latents first, the record last."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from maxdiffusion.errors import UserError
from maxdiffusion.media.write import FORMATS, write
from maxdiffusion.output import manifest, names
from maxdiffusion.output.record import write_record
from maxdiffusion.request import Job, Video
from maxdiffusion.request.videos import single, stem_of
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.runtime.progress import Advance
from maxdiffusion.weights.latents_io import save_latents

log = logging.getLogger(__name__)


class Output:
    """Where the videos of one batch go; made by `reserved`. Of several processes process 0 writes, for all of them."""

    def __init__(self, job: Job, videos: Sequence[Video], stems: Sequence[AnyPath]) -> None:
        """`stems` are the videos' paths without suffix."""
        self._job = job
        self._videos = videos
        self._stems = stems
        self.paths = [names.sibling(stem, _suffix(job)) for stem in stems]

    def save_latents(self, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """`<stem>.latents.safetensors` of each video; nothing where they came from such a file."""
        if self._job.cfg.decode_latents:
            return
        for stem, one, video in zip(self._stems, latents, self._videos, strict=True):
            metadata = _metadata(self._job, video)
            save_latents(names.sibling(stem, names.LATENTS), one[None], metadata, _overwrites(self._job))

    def write(self, clips: UInt8[np.ndarray, "b f h w c"], advance: Advance) -> list[AnyPath]:
        """Encodes each video in turn and returns their paths; `advance` is called after each."""

        def write_all() -> None:
            cfg = self._job.cfg
            for path, clip, video in zip(self.paths, clips, self._videos, strict=True):
                metadata = _metadata(self._job, video)
                write(clip, path, cfg.fps, cfg.output_format, metadata, _overwrites(self._job))
                advance(1)
                log.info("wrote %s", path)

        distributed.on_process_0(write_all)
        return self.paths

    def record(self, versions: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """`<stem>.json` beside each video; of a prompt file's videos also their line in the manifest."""

        def record_all() -> None:
            cfg = self._job.cfg
            for stem, path, video in zip(self._stems, self.paths, self._videos, strict=True):
                write_record(
                    names.sibling(stem, names.RECORD),
                    config=(single(cfg, video) if cfg.prompts else cfg).to_json(),
                    seed=video.seed,
                    versions=versions,
                    timings=timings,
                    output=path,
                    overwrite=_overwrites(self._job),
                )
            manifest.finish(self._job, self._videos)

        distributed.on_process_0(record_all)


@contextlib.contextmanager
def reserved(job: Job, videos: Sequence[Video], latents: Float[np.ndarray, "b f h w c"]) -> Iterator[Output]:
    """Holds a name for each video and saves its latents at once, so that a later failure cannot lose them.

    The name is `save_file` or that of a prompt file's line to the letter, or a readable one below output_dir/run_name.

    Raises:
      UserError: the folder cannot be written, or a named file has come meanwhile or is made by another run; the latents
        are then saved under a free name beside it.
    """

    def hold_and_save() -> list[str]:
        try:
            with contextlib.ExitStack() as attempt:
                stems = _hold(job, videos, attempt)
                hold.push(attempt.pop_all())
        except UserError as error:
            raise UserError(f"{error}{_save_elsewhere(job, videos, latents)}") from None
        Output(job, videos, stems).save_latents(latents)
        return list(map(str, stems))

    with contextlib.ExitStack() as hold:
        stems = distributed.on_process_0(hold_and_save)
        yield Output(job, videos, [parse(stem) for stem in stems])


def _save_elsewhere(job: Job, videos: Sequence[Video], latents: np.ndarray) -> str:
    """Saves latents whose videos' own names cannot be had; says where they are, for the message."""
    named = _named(job, videos)
    if job.cfg.decode_latents or not named:  # names made from prompts are free ones already
        return ""
    with contextlib.ExitStack() as hold:
        try:
            stems = [
                hold.enter_context(names.reserve(path.parent, path.name.removesuffix(_suffix(job)))) for path in named
            ]
            Output(job, videos, stems).save_latents(latents)
        except UserError:  # the first one says it all
            return ""
    kept = ", ".join(str(names.sibling(stem, names.LATENTS)) for stem in stems)
    return f"; what was denoised is kept: decode_latents={kept} makes the video of it"


def _hold(job: Job, videos: Sequence[Video], hold: contextlib.ExitStack) -> list[AnyPath]:
    named = _named(job, videos)
    if not named:
        folder = parse(job.cfg.output_dir) / job.cfg.run_name
        return [hold.enter_context(names.reserve(folder, stem_of(job.cfg, video))) for video in videos]
    besides = (names.RECORD,) if job.cfg.decode_latents else (names.RECORD, names.LATENTS)
    stems = [hold.enter_context(names.reserve_file(path, (_suffix(job), *besides), _overwrites(job))) for path in named]
    manifest.begin(job, videos)
    return stems


def _named(job: Job, videos: Sequence[Video]) -> list[AnyPath]:
    """The files that the user named."""
    if job.cfg.prompts is not None:
        return [manifest.video_path(job, video) for video in videos]
    return [] if job.cfg.save_file is None else [parse(job.cfg.save_file)]


def _suffix(job: Job) -> str:
    return FORMATS[job.cfg.output_format].suffix


def _metadata(job: Job, video: Video) -> dict[str, str]:
    metadata = {"seed": str(video.seed)}
    return {"prompt": video.prompt, **metadata} if job.cfg.save_prompt_in_metadata else metadata


def _overwrites(job: Job) -> bool:
    return job.cfg.overwrite or job.cfg.prompts is not None  # the manifest told that they are ours
