"""The files of one batch of videos: their names are reserved before the first write; latents first, the record last."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from maxdiffusion.errors import UserError
from maxdiffusion.media.write import write
from maxdiffusion.output import manifest, names
from maxdiffusion.request import Job, Video
from maxdiffusion.request.videos import single, stem_of
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.atomic import write_json
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.runtime.progress import Advance
from maxdiffusion.weights.latents_io import save_latents

log = logging.getLogger(__name__)


class Output:
    """The reserved files of a batch, made by `reserved`. Of several processes, process 0 writes them."""

    def __init__(self, job: Job, videos: Sequence[Video], stems: Sequence[AnyPath]) -> None:
        """`stems` are the paths of the files beside the videos, without suffix."""
        self._job = job
        self._videos = videos
        self._stems = stems
        self.paths = _named(job, videos) or [names.sibling(stem, job.suffix) for stem in stems]

    def save_latents(self, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """Write `<stem>.latents.safetensors` of each video, unless the run reads them from such a file."""
        if self._job.cfg.decode_latents:
            return
        for stem, one, video in zip(self._stems, latents, self._videos, strict=True):
            metadata = _metadata(self._job, video)
            save_latents(names.sibling(stem, names.LATENTS), one[None], metadata, _overwrites(self._job))

    def write(self, clips: UInt8[np.ndarray, "b f h w c"], advance: Advance) -> list[AnyPath]:
        """Encode the videos one after the other and return their paths; `advance` is called after each."""

        def write_all() -> None:
            cfg = self._job.cfg
            for path, clip, video in zip(self.paths, clips, self._videos, strict=True):
                metadata = _metadata(self._job, video)
                write(clip, path, cfg.fps, cfg.output_format, metadata, _overwrites(self._job))
                advance(1)
                log.info("wrote %s", path)

        distributed.on_process_0(write_all)
        return self.paths

    def record(
        self, versions: Mapping[str, Any], timings: Mapping[str, Any], inputs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Write `<stem>.json`, which reproduces the video, beside each; list a prompt file's videos in its manifest.

        `versions` is that of `runtime.versions`, `timings` that of `Clock.as_dict`, `inputs` that of
        `conditioning.Inputs.record`. The video is recorded by its name
        alone, since both lie in one folder, which may be moved.
        """

        def record_all() -> None:
            cfg = self._job.cfg
            for stem, path, video in zip(self._stems, self.paths, self._videos, strict=True):
                config = (single(cfg, video) if cfg.prompts else cfg).to_json()
                record = {"output": path.name, "seed": video.seed, "config": config}
                record |= {"inputs": dict(inputs), "versions": versions, "timings": timings}
                write_json(names.sibling(stem, names.RECORD), record, _overwrites(self._job))
            manifest.finish(self._job, self._videos)

        distributed.on_process_0(record_all)


@contextlib.contextmanager
def reserved(job: Job, videos: Sequence[Video], latents: Float[np.ndarray, "b f h w c"]) -> Iterator[Output]:
    """Reserve a name for each video and save its latents at once, so that a later failure cannot lose them.

    The name is `save_file`, that of a prompt file's line, or a readable one below output_dir/run_name.

    Raises:
      UserError: the folder cannot be written, or a named file exists by now or is reserved by another run; the latents
        are then saved under a free name beside it.
    """

    def reserve_and_save() -> list[str]:
        named = _named(job, videos)
        try:
            with contextlib.ExitStack() as attempt:
                if named:
                    besides = (names.RECORD,) if job.cfg.decode_latents else (names.RECORD, names.LATENTS)
                    suffixes = (_suffix_of(named[0], job), *besides)
                    ways = [names.reserve_file(path, suffixes, _overwrites(job)) for path in named]
                else:
                    ways = [names.reserve(manifest.folder(job), stem_of(job.cfg, video)) for video in videos]
                stems = [attempt.enter_context(way) for way in ways]
                manifest.begin(job, videos)
                reservations.push(attempt.pop_all())
        except UserError as error:
            raise UserError(f"{error}{_save_elsewhere(job, videos, named, latents)}") from None
        Output(job, videos, stems).save_latents(latents)
        return list(map(str, stems))

    with contextlib.ExitStack() as reservations:
        stems = distributed.on_process_0(reserve_and_save)
        yield Output(job, videos, [parse(stem) for stem in stems])


def _named(job: Job, videos: Sequence[Video]) -> list[AnyPath]:
    """The files that the user named."""
    if job.cfg.prompts is not None:
        return [manifest.video_path(job, video) for video in videos]
    return [] if job.cfg.save_file is None else [parse(job.cfg.save_file)]


def _save_elsewhere(job: Job, videos: Sequence[Video], named: list[AnyPath], latents: np.ndarray) -> str:
    """Save the latents of videos whose names cannot be reserved; return the end of the error message."""
    if job.cfg.decode_latents or not named:  # names made from prompts are always free
        return ""
    with contextlib.ExitStack() as reservations:
        ways = [names.reserve(path.parent, path.name.removesuffix(_suffix_of(path, job))) for path in named]
        try:
            stems = [reservations.enter_context(way) for way in ways]
            Output(job, videos, stems).save_latents(latents)
        except UserError:  # the first error is the one to read
            return ""
    kept = ", ".join(str(names.sibling(stem, names.LATENTS)) for stem in stems)
    return f"; the latents are saved: decode_latents={kept} makes the video of them"


def _suffix_of(path: AnyPath, job: Job) -> str:
    """The suffix as the user wrote it, such as .MP4; none of a folder of frames."""
    return path.suffix if job.suffix else ""


def _metadata(job: Job, video: Video) -> dict[str, str]:
    metadata = {"seed": str(video.seed)}
    return {"prompt": video.prompt, **metadata} if job.cfg.save_prompt_in_metadata else metadata


def _overwrites(job: Job) -> bool:
    return job.cfg.overwrite or job.cfg.prompts is not None  # `remaining` has refused files of other runs
