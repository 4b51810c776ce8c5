"""Encodes the conditioning of a run's videos once, with one encoder in memory at a time."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning import text
from maxdiffusion.conditioning.clips import Chain, read_extended
from maxdiffusion.conditioning.control_video import ControlVideo
from maxdiffusion.conditioning.kind import SEGMENT, START, Grid, Kind, Shapes
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image
from maxdiffusion.media.frames import between_bars
from maxdiffusion.media.sizes import own
from maxdiffusion.media.sound import Sound
from maxdiffusion.models.dit.context import Context, Contexts
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.parallel import axes
from maxdiffusion.request import Job, Video, audio
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed

log = logging.getLogger(__name__)

# A condition of a task -> where its `Kind` is; a run imports those of its variant.
KINDS: Mapping[str, str] = {
    "image_tokens": "image:TOKENS",
    "image_channels": "image:CHANNELS",
    "first_frame": "image:FIRST_FRAME",
    "vace": "vace:KIND",
    "video_to_video": "video_to_video:KIND",
    "animate": "animate:KIND",
    "character_tokens": "animate:TOKENS",
    "animate2": "animate2:KIND",
    "animate2_tokens": "animate2:TOKENS",
    "s2v": "s2v:KIND",
}


def kind(name: str) -> Kind:
    """The kind of conditioning of that name, a key of `KINDS`."""
    module, _, value = KINDS[name].partition(":")
    return getattr(importlib.import_module(f"maxdiffusion.conditioning.{module}"), value)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The contents of a run's input files.

    Attributes:
      by_kind: by kind of conditioning; only what is given.
      images: location -> what was converted of that image, see `open_image`; only where anything was.
      extended: the video that the first clip goes on from.
      sound: of one of them, that the results keep.
      shown: image of a video -> rows and columns between the black bars, which alone its result has; empty where images
        are not put on black.
    """

    by_kind: Mapping[str, Any]
    images: Mapping[str, Mapping[Any, Any]] = dataclasses.field(default_factory=dict)
    extended: ControlVideo | None = None
    sound: Sound | None = None
    shown: Mapping[str, tuple[slice, slice]] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """See `distributed.digest`."""
        return distributed.digest(jax.tree.leaves((self.by_kind, self.extended)))

    def results(
        self, made: Iterable[UInt8[np.ndarray, "b f h w 3"]], videos: Sequence[Video], overlap: int
    ) -> Iterator[list[UInt8[np.ndarray, "f2 h2 w2 3"]]]:
        """In chunks, what was made of each video, between the black bars, or after the video that it extends.

        The first `overlap` frames are the last ones of that video, and left out.
        """
        whole = slice(None), slice(None)
        if self.extended is None:
            shown = [self.shown.get(str(video.image), whole) for video in videos]
            yield from ([each[:, *cut] for each, cut in zip(chunk, shown, strict=True)] for chunk in made)
            return
        yield [self.extended.frames] * len(videos)
        for chunk in made:
            yield list(chunk[:, overlap:])
            overlap = max(overlap - chunk.shape[1], 0)

    def length(self, made: int, overlap: int) -> int:
        """The number of frames of the results, of which so many are made; see `results`."""
        return made if self.extended is None else len(self.extended.frames) + made - overlap

    def record(self) -> dict[str, Any]:
        """As JSON types: key of an input video -> what was used of it; location of an image -> what was converted."""
        videos = {key: each.used.record() for key, each in _videos(self.by_kind, self.extended).items()}
        return videos | {at: dict(changed) for at, changed in self.images.items()}


def read(job: Job) -> Inputs:
    """Reads and checks every file, each image once, before anything is loaded.

    Raises:
      UserError: a file is damaged, or does not suit the config, on any host.
    """
    with distributed.fail_together():
        extended = read_extended(job)
        names = job.spec.task.conditions
        if job.cfg.decode_latents and not job.segments.dropped:  # else the first segment is decoded after the image
            names = ()
        opened = names or job.spec.task.letterboxed
        images = {at: open_image(at) for video in job.videos for at in video.images} if opened else {}
        found = {name: kind(name).read(job, images) for name in names}
        by_kind = {name: given for name, given in found.items() if given is not None}
        sound = _sound(job, _videos(by_kind, extended))
        shown = _shown(job, images) if job.spec.task.letterboxed else {}
    changed = {at: image.info for at, image in images.items() if image.info}
    return Inputs(by_kind, changed, extended, sound, shown)


def _shown(job: Job, images: Mapping[str, Image.Image]) -> dict[str, tuple[slice, slice]]:
    """`Inputs.shown`; an mp4 shows an even number of rows and columns."""
    cfg, found = job.cfg, {}
    if not images:
        log.info("the black bars beside the character stay, as image is not given")
    for location, image in images.items():
        size = image.size if job.conventions.bars == "image" else own(0, image.size, job.spec.size_step)
        rows, columns = between_bars(size, cfg.height, cfg.width)
        if cfg.output_format == "mp4":
            rows, columns = (slice(part.start, part.stop - (part.stop - part.start) % 2) for part in (rows, columns))
        found[location] = rows, columns
        shown = columns.stop - columns.start, rows.stop - rows.start
        if shown != (cfg.width, cfg.height):
            words = "image %s: %d x %d pixels of the %d x %d are shown, without black bars"
            log.info(words, location, *shown, cfg.width, cfg.height)
    return found


def _videos(by_kind: Mapping[str, Any], extended: ControlVideo | None) -> dict[str, ControlVideo]:
    """The input videos, by their keys."""
    given = jax.tree.leaves((by_kind, extended), is_leaf=lambda value: isinstance(value, ControlVideo))
    return {each.used.key: each for each in given if isinstance(each, ControlVideo)}


def _sound(job: Job, videos: Mapping[str, ControlVideo]) -> Sound | None:
    """The sound of the results: `audio`, or what `keep_audio` keeps of the first input that has any.

    The first frames of S2V are dropped, so that its results begin as many frames into the sound. The official code
    adds it from its beginning, three frames late.

    Raises:
      UserError: its stored frames are shown at another rate than their own.
    """
    cfg = job.cfg
    if cfg.audio:
        if cfg.output_format != "mp4":
            log.info("output_format=%s holds no sound", cfg.output_format)
            return None
        return Sound(cfg.audio, job.segments.frames / cfg.fps, job.segments.dropped / cfg.fps)
    if not cfg.keep_audio:
        return None
    found = [(key, videos[key]) for key in audio.keys(cfg) if key in videos and videos[key].used.sound]
    if not found:
        log.info("no input video has sound, and the result has none")
        return None
    key, video = found[0]
    rate = video.used.info.fps
    if cfg.input_frames == "every" and key != "extend" and rate != cfg.fps:
        raise UserError(
            f"keep_audio and input_frames=every exclude each other here: {key}={video.used.file} has "
            f"{'no stated rate' if rate is None else f'{float(rate):.4g} frames per second'}, and the result shows "
            f"them at fps={cfg.fps}; write input_frames=timed."
        )
    log.info("the sound of %s is kept", key)
    frames = len(video.frames) if key == "extend" else job.segments.frames
    return Sound(video.used.file, frames / cfg.fps)


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """Shapes of the conditioning beside the text of videos of one shape, as `encode` makes it."""
    found = [kind(name).shapes(job, videos, configs, grid) for name in job.spec.task.conditions]
    return Shapes(
        {name: value for each in found for name, value in each.fields.items()},
        sum((Counter(each.encoded) for each in found), Counter()),
        sum(each.images for each in found),
    )


class Conditioning:
    """The conditioning of every video of a run, on the host: a batch at a time is put on the devices."""

    def __init__(
        self,
        by_prompt: Mapping[str, Float[np.ndarray, "_ e"]],
        fields: Mapping[Video, Mapping[str, Any]],
        performer: Any = None,
        chain: Chain | None = None,
    ) -> None:
        """`by_prompt` is the result of `text.encode`; `fields` are the other fields of each video's `Context`.

        `performer` (see `Kind.performer`) makes those that differ from segment to segment of a long video, `chain`
        those of clips.
        """
        self._by_prompt = by_prompt
        self._fields = fields
        self._performer = performer
        self._chain = chain

    def contexts(
        self, videos: Sequence[Video], guided: bool, before: Sequence[Float[np.ndarray, "b f h w c"]] = ()
    ) -> Contexts:
        """Contexts of one batch; the negative one, if guided, shares all but text, and face or sound.

        `before` holds the latents of the finished segments of these videos.
        """
        prompts = [video.prompt for video in videos]
        if self._chain is None:
            fields = {name: self._put(videos, name) for name in self._fields[videos[0]] if name != START}
        else:
            prompts, fields = self._chain.prompts(videos, len(before)), self._chain.fields(videos, before)
        positive = negative = fields
        if self._performer is not None:
            positive, negative = self._performer.fields(fields.pop(SEGMENT), before)

        def context(prompts: Sequence[str], more: Mapping[str, Any]) -> Context:
            words = parallel.put(text.padded([self._by_prompt[prompt] for prompt in prompts]))
            return Context(words, **{**fields, **more})

        shown = context(prompts, positive)
        return Contexts(shown, context([video.negative_prompt for video in videos], negative) if guided else None)

    def start(
        self, videos: Sequence[Video], noise: Float[Array, "b f h w c"], recipe: Recipe
    ) -> Float[Array, "b f h w c"]:
        """Initial latents at the first noise level: the noise, or the input videos with noise added."""
        if START not in self._fields[videos[0]]:
            return noise if recipe.noise_scale == 1 else recipe.noise_scale * noise
        sigma = float(recipe.schedule.sigmas[0])
        return sigma * noise + (1 - sigma) * self._put(videos, START)

    def _put(self, videos: Sequence[Video], name: str) -> Any:
        """One field of a batch, on the devices."""
        rows = (self._fields[video][name] for video in videos)
        return jax.tree.map(lambda *leaves: parallel.put(np.stack(leaves)), *rows)


def encode(s: Session, inputs: Inputs) -> Conditioning:
    """Loads each encoder that the variant has, encodes each different input and frees the encoder again."""
    videos = s.job.videos
    fields: dict[Video, dict[str, Any]] = {video: {} for video in videos}
    for name, given in inputs.by_kind.items() if not s.job.chained else ():
        for video, value in zip(videos, kind(name).encode(s, given), strict=True):
            fields[video][kind(name).field] = value
    if not s.recipe.guided and any(video.negative_prompt != s.job.spec.negative_prompt for video in videos):
        log.info("negative_prompt is not used, as no step is guided (guidance_scale=1)")
    by_prompt = text.encode(s, s.job.prompts(s.recipe.guided))
    if s.job.chained:
        kinds = [(kind(name), inputs.by_kind.get(name, {})) for name in s.job.spec.task.conditions]
        return Conditioning(by_prompt, fields, chain=Chain(s, kinds, inputs.extended))
    for name, given in inputs.by_kind.items():
        if (performer := kind(name).performer) is not None:
            return Conditioning(by_prompt, fields, performer(s, given, by_prompt))
    return Conditioning(by_prompt, fields)


def decoding(
    s: Session, vae: WanVAE, inputs: Inputs, videos: Sequence[Video]
) -> Callable[[Float[np.ndarray, "b f h w c"]], Iterator[Float[Array, "b _ h2 w2 3"]]]:
    """The latents of a segment of these videos -> its frames, in chunks; to be called for each segment in order."""
    for name, given in inputs.by_kind.items():
        if (own := kind(name).decoding) is not None:
            return own(s, vae, given, videos)
    return lambda latents: vae.decode_chunks(parallel.put(latents, axes.BATCH))
