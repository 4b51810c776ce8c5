"""The files of a run's videos: names are reserved before the work; latents first, the record last."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import re
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from maxdiffusion.errors import UserError
from maxdiffusion.media import drift
from maxdiffusion.media.contact_sheet import contact_sheet, shown
from maxdiffusion.media.sound import Sound
from maxdiffusion.media.write import check_format, write, writing
from maxdiffusion.output import clip_files, manifest, names, states
from maxdiffusion.output.frames import Frames
from maxdiffusion.output.gallery import Gallery
from maxdiffusion.output.states import States
from maxdiffusion.output.writer import Writer
from maxdiffusion.request import Job, Video, session
from maxdiffusion.request.videos import single, stem_of
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import write_json
from maxdiffusion.runtime.lock import owner_died
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.runtime.progress import Advance
from maxdiffusion.runtime.stop import Stopped
from maxdiffusion.weights.latents_io import load_latents, save_latents

log = logging.getLogger(__name__)


class Output:
    """The reserved files of a batch, made by `Outputs.reserve`. Of several processes, process 0 writes them."""

    def __init__(
        self,
        job: Job,
        videos: Sequence[Video],
        stems: Sequence[AnyPath],
        identities: Sequence[str],
        clip_identities: Sequence[Sequence[str]],
    ) -> None:
        """`stems` are the paths of the files beside the videos, without suffix."""
        self.videos = tuple(videos)
        self._job = job
        self._stems = stems
        self._identities = identities
        self._length = job.cfg.num_frames
        self._clips = clip_identities
        self._looks: dict[Video, list[drift.Look]] = {}
        self.paths = _named(job, videos) or [names.sibling(stem, job.suffix) for stem in stems]
        self._latents = [names.sibling(stem, names.LATENTS) for stem in stems]
        self._frames: list[Frames] = []
        self._writers: list[Writer] = []

    def save_latents(self, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """Write `<stem>.latents.safetensors` of each video, unless they came from such a file.

        Where the folder cannot take them, they are saved in the temporary folder, and the log says so.

        Raises:
          UserError: no folder can take them.
        """

        def save_all() -> None:
            rows = zip(self._latents, latents, self.videos, self._identities, strict=True)
            for row, (path, one, video, identity) in enumerate(rows):
                metadata = {"identity": identity, **_metadata(self._job, video)}
                if finished_latents(path, identity):
                    continue
                try:
                    save_latents(path, one[None], metadata, overwrite=True)
                except UserError as error:
                    stem = path.name.removesuffix(names.LATENTS)
                    other = Path(tempfile.gettempdir()) / f"{stem}-{secrets.token_hex(4)}{names.LATENTS}"
                    save_latents(other, one[None], metadata)
                    self._latents[row] = other
                    log.warning("%s; the latents are in %s: decode_latents=%s makes the video", error, other, other)

        if not self._job.cfg.decode_latents:
            distributed.on_process_0(save_all)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Adds to an error within the block, and to a stop, where the latents are and how the video is made of them."""
        where = " and ".join(map(str, self._latents))
        words = "the same command decodes" if self._job.cfg.prompts else "decode_latents=PATH decodes"
        try:
            yield
        except UserError as error:
            if not self._job.cfg.decode_latents:
                error.args = (f"{str(error).rstrip('.')}; the latents are kept in {where}, and {words} them",)
            raise
        except Stopped as stopped:
            if self._job.cfg.decode_latents:
                raise
            raise Stopped(stopped.signal, f"stopped, the latents are kept in {where}") from None

    def begin(self, latents: Float[np.ndarray, "b fl hl wl z"]) -> UInt8[np.ndarray, "b f h w c"] | None:
        """Where results are folders of frames: the first frames that an earlier run has decoded of these latents.

        Several processes, and tasks whose results are cut, decode all frames.
        """
        cut = self._job.cfg.extend or self._job.spec.task.letterboxed
        if self._job.suffix or cut or distributed.count() > 1:
            return None
        rows = zip(self._stems, latents, self._identities, self.videos, strict=True)
        self._frames = [
            Frames(Path(str(stem)), one, identity, _metadata(self._job, video)) for stem, one, identity, video in rows
        ]
        count = min(len(each.there) for each in self._frames)
        if not count:
            return None
        log.info("%d of %d frames are there already", count, self._job.segments.frames)
        return np.stack([np.stack(each.there[:count]) for each in self._frames])

    def save_clip(self, number: int, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """Write the latents of clip `number`, from 0, of each video; one that cannot be written is a warning."""

        def save_all() -> None:
            rows = zip(self._stems, latents, self.videos, self._clips, strict=True)
            for stem, one, video, identities in rows:
                path, job = names.sibling(stem, clip_files.suffix(number)), self._job
                alone = dataclasses.replace(video, prompt=job.prompt(video, number), seed=job.seed(video, number))
                try:
                    save_latents(path, one[None], {"identity": identities[number], **_metadata(job, alone)}, True)
                except UserError as error:
                    log.warning("the latents of clip %d are not kept: %s", number + 1, error)

        distributed.on_process_0(save_all)

    @contextlib.contextmanager
    def writing(self, length: int, sound: Sound | None = None) -> Iterator[None]:
        """Within the block, `add` takes the batch's videos, of `length` frames, and `finish` gives them their names.

        Each is encoded in a thread of its own. Where the block raises, nothing of them is left but frames in a folder.
        """
        job, self._length = self._job, length
        cut, overwrite = job.segments, _overwrites(job)
        sheet = shown(length, job.cfg.contact_sheet) if names.SHEET in manifest.besides(job) else []
        starts = [length - cut.frames + start for start in cut.starts] if job.chained else []
        clips = [range(start, start + cut.length) for start in starts]  # after the frames of `extend`

        def file(path: AnyPath, video: Video, frames: Frames | None) -> AbstractContextManager[Any]:
            if frames is not None:
                return frames.writing(Path(str(path)), overwrite)
            return writing(path, job.cfg.fps, job.cfg.output_format, _metadata(job, video), overwrite, sound)

        def begin() -> None:
            for row in itertools.zip_longest(self.paths, self.videos, self._frames):
                self._writers.append(stack.enter_context(Writer(file(*row), sheet, clips)))

        self._writers = []
        with contextlib.ExitStack() as stack:
            distributed.on_process_0(begin)
            yield

    def add(self, clips: Iterable[UInt8[np.ndarray, "f h w c"]]) -> None:
        """Take the next frames of each video."""
        for writer, frames in zip(self._writers, clips, strict=False):  # several processes: none but on the first
            writer.add(frames)

    def finish(self, advance: Advance) -> list[AnyPath]:
        """Wait for one video after the other and return their paths; `advance` is called after each.

        The contact sheet of each is written after it. Of a video of several clips, how the look changes from clip to
        clip is logged, and recorded by `record`.
        """

        def finish_all() -> None:
            cfg, overwrite = self._job.cfg, _overwrites(self._job)
            for stem, path, video, writer in zip(self._stems, self.paths, self.videos, self._writers, strict=True):
                writer.finish()
                if self._job.chained:
                    self._looks[video] = writer.looks
                    drift.report(writer.looks)
                if writer.sheet:
                    sheet = contact_sheet(np.stack(writer.sheet), cfg.contact_sheet)[None]
                    metadata = _metadata(self._job, video)
                    write(sheet, names.sibling(stem, names.SHEET), cfg.fps, "jpg", metadata, overwrite)
                advance(1)
                log.info("wrote %s", path)

        distributed.on_process_0(finish_all)
        return self.paths

    def record(
        self,
        versions: Mapping[str, Any],
        timings: Mapping[str, Any],
        inputs: Mapping[str, Any] = MappingProxyType({}),
        cache: Mapping[Video, Any] = MappingProxyType({}),
    ) -> None:
        """Write `<stem>.json`, which reproduces the video, beside each.

        `versions` is that of `runtime.versions`, `timings` that of `Clock.as_dict`, `inputs` that of
        `conditioning.Inputs.record`, `cache` what `cache_records` tells of each video. The video is recorded by its
        name alone, since both lie in one folder, which may be moved.
        """

        def record_all() -> None:
            cfg = self._job.cfg
            rows = zip(self._stems, self.paths, self.videos, self._identities, strict=True)
            for stem, path, video, identity in rows:
                config = (single(cfg, video) if cfg.prompts else cfg).to_json()
                record = {"output": path.name, "frames": self._length, "seed": video.seed}
                record |= {"identity": identity, "config": config}
                if names.SHEET in manifest.besides(self._job):
                    record["contact_sheet"] = stem.name + names.SHEET
                record |= {"inputs": dict(inputs), "versions": versions, "timings": timings}
                if cfg.low_resolution_steps is not None:
                    record["low_resolution_steps"] = session.recipe_of(self._job).half_steps
                if video in cache:
                    record["cache"] = cache[video]
                if video in self._looks:
                    record["clips"] = [
                        {"prompt": self._job.prompt(video, number), "seed": self._job.seed(video, number)}
                        | look._asdict()
                        for number, look in enumerate(self._looks[video])
                    ]
                write_json(names.sibling(stem, names.RECORD), record, _overwrites(self._job))

        distributed.on_process_0(record_all)


class Outputs:
    """The files of a run: reserved batch by batch, before the work, and states of videos that are not whole."""

    def __init__(self, job: Job, model: str) -> None:
        """`model` is the checkpoint's digest. Reads the states that earlier runs left."""
        self._job, self._model = job, model
        self._held: dict[tuple[Video, ...], tuple[Output, contextlib.ExitStack]] = {}
        self._folder = contextlib.ExitStack()
        if distributed.index() == 0:
            self._folder.enter_context(names.removed_if_empty(states.folder(job)))
        distributed.on_process_0(lambda: check_format(job.cfg.output_format))
        self.states = States(job, model)
        self._gallery = Gallery(job)
        if job.cfg.redo_clip is not None:
            self.states.start_from(self._kept())
        if job.cfg.save_file and not job.cfg.decode_latents:
            self.reserve(job.videos)  # refused now rather than after the encoders

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exception: object) -> None:
        self.states.close()
        for _, reservation in self._held.values():
            reservation.close()
        self._folder.close()

    def denoised(self) -> Iterator[tuple[tuple[Video, ...], Float[np.ndarray, "1 f h w c"]]]:
        """The videos whose latents an earlier run has saved and not decoded, with these."""
        for row, path in distributed.on_process_0(lambda: self._left(_undecoded)).items():
            how = f"anew, as {self._job.cfg.output_format} is written whole" if self._job.suffix else "on"
            log.info("%s holds the latents of an earlier run of this command; they are decoded %s", path, how)
            yield (self._job.videos[int(row)],), load_latents(parse(path))[0]

    def unfinished(self, denoised: Sequence[Video]) -> list[int]:
        """The rows of the job's videos that are to be denoised: without those of `denoised`.

        Where an earlier run of this command ended within its videos, those that it finished are left out, too.
        """

        def finished() -> dict[int, str]:
            if self._job.cfg.prompts is not None:
                return self._left(_finished, manifest.begun(self._job))
            return self._left(_finished) if denoised or self.states.progress or _killed(self._job) else {}

        whole = distributed.on_process_0(finished)
        if self._job.cfg.redo_clip and len(whole) == len(self._job.videos):
            raise UserError(
                f"redo_clip={self._job.cfg.redo_clip} would make {next(iter(whole.values()))} again: no clip has "
                "another prompt or seed; give that clip another one, such as by clip_seeds."
            )
        if whole:
            log.info("%d of %d videos exist already", len(whole), len(self._job.videos))
        kept = {int(row) for row in whole}
        self._list([self._job.videos[row] for row in kept])  # of a run killed after their records
        return [row for row, video in enumerate(self._job.videos) if row not in kept and video not in denoised]

    def _kept(self) -> dict[Video, list[str]]:
        """The files of the clips before `redo_clip` of each video that no state is left of."""
        rows = [row for row, video in enumerate(self._job.videos) if video not in self.states.progress]
        found = distributed.on_process_0(
            lambda: [clip_files.kept(self._job, self._job.videos[row], self._model) for row in rows]
        )
        return {self._job.videos[row]: files for row, files in zip(rows, found, strict=True)}

    def _left(
        self, of: Callable[[AnyPath, str], AnyPath | None], outputs: Collection[str] | None = None
    ) -> dict[int, str]:
        """Row -> the file of each video, or of these outputs, for which `of` (stem, identity) finds one."""
        if self._job.cfg.decode_latents:
            return {}
        found = {}
        for row, video in enumerate(self._job.videos):
            for stem in _stems(self._job, video) if outputs is None or video.output in outputs else ():
                if (path := of(stem, self._identity(video))) is not None:
                    found[row] = str(path)
        return found

    def reserve(self, videos: tuple[Video, ...]) -> Output:
        """Reserve a name for each video of a batch, until `finish`.

        The name is `save_file`, that of a prompt file's line, or a readable one below output_dir/run_name.

        Raises:
          UserError: the folder cannot be written, or a named file exists by now or is reserved by another run.
        """
        if videos in self._held:
            return self._held[videos][0]
        job, identities = self._job, [self._identity(video) for video in videos]
        clips = [clip_files.identities(job, video, self._model) for video in videos]
        ours = [_ours({identity, *parts}) for identity, parts in zip(identities, clips, strict=True)]

        def reserve_all() -> list[str]:
            named = _named(job, videos)
            with contextlib.ExitStack() as attempt:
                if named:
                    parts = () if job.cfg.decode_latents else map(clip_files.suffix, range(len(clips[0])))
                    suffixes = (_suffix_of(named[0], job), *manifest.besides(job), *parts)
                    ways = [
                        names.reserve_file(path, suffixes, _overwrites(job), own, identity)
                        for path, own, identity in zip(named, ours, identities, strict=True)
                    ]
                else:
                    ways = [
                        names.reserve(manifest.folder(job), stem_of(job.cfg, video), own, identity)
                        for video, own, identity in zip(videos, ours, identities, strict=True)
                    ]
                stems = [attempt.enter_context(way) for way in ways]
                manifest.begin(job, videos)
                reservations.push(attempt.pop_all())
            return list(map(str, stems))

        reservations = contextlib.ExitStack()
        stems = distributed.on_process_0(reserve_all)
        files = Output(job, videos, [parse(stem) for stem in stems], identities, clips)
        self._held[videos] = files, reservations
        return files

    def kept(self) -> str:
        """What an interrupted denoise goes on from: the end of a sentence; empty where nothing is saved."""
        at = self.states.saved
        return "" if at is None else f"the state after step {at.step} is saved, and the same command goes on from it"

    def save_segment(self, videos: tuple[Video, ...], number: int, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """Keep the latents of a clip; segments that are not clips are not kept."""
        if self._job.chained:
            self.reserve(videos).save_clip(number, latents)

    def finish(self, files: Output) -> None:
        """Free the names of a batch whose files are whole, remove its states, and show it in manifest and gallery."""
        self._list(files.videos)
        self._held.pop(files.videos)[1].close()
        self._gallery.add(files.paths)

    def _list(self, videos: Sequence[Video]) -> None:
        """Remove the states of whole videos, then list those of a prompt file as finished: later runs ask no more."""
        self.states.remove(videos)
        distributed.on_process_0(lambda: manifest.finish(self._job, videos))

    def _identity(self, video: Video) -> str:
        return states.identity(self._job, video, self._model)


def finished_latents(path: AnyPath, identity: str) -> bool:
    """Whether a file holds the latents of the video with that identity."""
    return clip_files.identity_of(path) == identity


def _ours(identities: Collection[str]) -> Callable[[AnyPath], bool]:
    """Whether a file that exists is the latents of that video or a clip of it, left by a run that was stopped."""
    return lambda path: path.name.endswith(names.LATENTS) and clip_files.identity_of(path) in identities


def _undecoded(stem: AnyPath, identity: str) -> AnyPath | None:
    """The latents of a video that have no record yet."""
    path = names.sibling(stem, names.LATENTS)
    whole = finished_latents(path, identity) and not names.sibling(stem, names.RECORD).exists()
    return path if whole else None


def _finished(stem: AnyPath, identity: str) -> AnyPath | None:
    """The record of a whole video."""
    path = names.sibling(stem, names.RECORD)
    try:
        return path if path.exists() and json.loads(path.read_text()).get("identity") == identity else None
    except (OSError, ValueError, AttributeError):
        return None


def _killed(job: Job) -> bool:
    """Whether a run was killed while it made one of these videos, under a default name: its reservation is there."""
    folder = manifest.folder(job)
    if job.cfg.save_file or not isinstance(folder, Path):
        return False
    stems = "|".join({re.escape(stem_of(job.cfg, video)) for video in job.videos})
    locks = [name for name in paths.names(folder) if re.fullmatch(rf"\.({stems})(-\d+)?\.lock", name)]
    return any(owner_died(folder / name) for name in locks)


def _stems(job: Job, video: Video) -> Iterator[AnyPath]:
    """The stems that may be this video's."""
    named = _named(job, [video])
    if named:
        yield named[0].with_name(named[0].name.removesuffix(_suffix_of(named[0], job)))
        return
    folder, stem = manifest.folder(job), stem_of(job.cfg, video)
    for name in paths.names(folder):
        found = name.removesuffix(names.LATENTS)
        if found != name and re.fullmatch(re.escape(stem) + r"(-\d+)?", found):
            yield folder / found


def _named(job: Job, videos: Sequence[Video]) -> list[AnyPath]:
    """The files that the user named."""
    if job.cfg.prompts is not None:
        return [manifest.video_path(job, video) for video in videos]
    return [] if job.cfg.save_file is None else [parse(job.cfg.save_file)]


def _suffix_of(path: AnyPath, job: Job) -> str:
    """The suffix as the user wrote it, such as .MP4; none of a folder of frames."""
    return path.suffix if job.suffix else ""


def _metadata(job: Job, video: Video) -> dict[str, str]:
    metadata = {"seed": str(video.seed)}
    return {"prompt": video.prompt, **metadata} if job.cfg.save_prompt_in_metadata else metadata


def _overwrites(job: Job) -> bool:
    return job.cfg.overwrite or job.cfg.prompts is not None  # `remaining` has refused files of other runs
