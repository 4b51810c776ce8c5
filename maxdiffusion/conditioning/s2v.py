"""The image, the sound, the pose and the clips of an S2V transformer.

A video is made in clips of 80 frames: the first is decoded after the image's latent, which stands for one frame, each
later one after the latents of the 73 frames before it. The first three frames of the first clip are dropped, so that
the sound of a result begins three frames in.

Reference: wan/speech2video.py of the official repository.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video, sound
from maxdiffusion.conditioning.control_video import ControlVideo, Used
from maxdiffusion.conditioning.kind import SEGMENT, Grid, Images, Kind, Shapes, fp32
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import to_float
from maxdiffusion.media.read import read_clip
from maxdiffusion.media.samples import read_samples
from maxdiffusion.models.dit.config import S2VConfig
from maxdiffusion.models.dit.s2v import Speech
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.models.wav2vec2.config import SAMPLE_RATE, XLSR_53
from maxdiffusion.parallel import axes
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.distributed import fetch

log = logging.getLogger(__name__)

BEFORE = 73  # frames

Fields = dict[str, Any]
Still = tuple[str, int, int]  # location, width, height


class Inputs(NamedTuple):
    """The images in the videos' sizes; the sound, which decoding alone does without; the pose of every made frame."""

    stills: Mapping[Still, UInt8[np.ndarray, "h w 3"]]
    samples: Float[np.ndarray, " samples"] | None
    pose: ControlVideo | None


def read(job: Job, images: Images) -> Inputs:
    """The contents of `image`, `audio` and `pose_video`; of the image alone, where latents are only decoded.

    Raises:
      UserError: the sound is shorter than the video's clips by a clip or more; see also `read_samples`, `read_clip`.
    """
    stills = {}
    for still in dict.fromkeys(map(_still, job.videos)):
        location, width, height = still
        image = images[location]
        stills[still] = np.asarray(fitted(image, width, height))
        log.info(
            "image %s: %d x %d pixels, short side resized, made %d x %d by cropping or on black",
            *(location, image.width, image.height, width, height),
        )
    if job.cfg.decode_latents:
        return Inputs(stills, None, None)
    return Inputs(stills, _samples(job), _pose(job))


def _still(video: Video) -> Still:
    return str(video.image), video.width, video.height


def _samples(job: Job) -> Float[np.ndarray, " samples"]:
    cfg, cut = job.cfg, job.segments
    found = read_samples(str(cfg.audio), SAMPLE_RATE)
    sound.check_length(f"audio={cfg.audio}", found, XLSR_53)
    states = XLSR_53.length(len(found.values))
    most = sound.clips(states, XLSR_53.rate, cfg.fps, cut.length) * cut.length - cut.dropped
    if cut.frames > most:
        raise UserError(
            f"audio={cfg.audio} lasts {found.seconds:.4g} s, so that at most {most} frames can be made at "
            f"fps={cfg.fps}, and num_frames={cut.frames}; leave num_frames out, or write less."
        )
    return found.values


def _pose(job: Job) -> ControlVideo | None:
    """The pose of every frame that is made; black, where the pose video has ended."""
    cfg, path = job.cfg, job.cfg.pose_video
    if path is None:
        return None
    height, width = control_video.one_size(job)
    count = len(job.segments) * job.segments.length
    at = control_video.wanted(cfg.model_copy(update={"num_frames": count}), path)
    clip = read_clip(path, at, lambda frame: np.asarray(fitted(Image.fromarray(frame), width, height)))
    info, found = clip.info, count if clip.still else len(clip.frames)
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:found] = clip.frames
    ended = f"; it has {found} of {count} frames, the others are black" if found < count else ""
    log.info("pose_video: %d x %d pixels, made %d x %d%s", info.width, info.height, width, height, ended)
    first, last, different = clip.indices[0], clip.indices[-1], len(set(clip.indices))
    return ControlVideo(frames, Used("pose_video", path, info, first, last, different, clip.colour, clip.sound))


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image with its short side made that of the size (bilinear), then cropped in the middle or put on black.

    Reference: `Resize` of the short side and `CenterCrop` of torchvision.
    """
    short, (w, h) = min(width, height), image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = ((out - own) // 2 if own < out else -round((own - out) / 2) for own, out in ((w, width), (h, height)))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR), (left, top))
    return canvas


def encode(s: Session, given: Inputs) -> list[Float[np.ndarray, "1 h w z"]]:
    """The latents of each video's image."""
    vae = s.load("vae")
    with s.stages("image"):
        latents = {still: _encoded(vae, given.stills[still]) for still in dict.fromkeys(map(_still, s.job.videos))}
    return [latents[_still(video)] for video in s.job.videos]


def _encoded(vae: WanVAE, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "1 h2 w2 z"]:
    return fetch(vae.encode(parallel.put(to_float(image[None], *image.shape[:2])[None])))[0]


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`. What is encoded to decode the clips is counted, too."""
    (f, h, w), z, cut, audio = grid, configs["vae"].z_dim, job.segments, configs["audio_encoder"]
    speech = Speech(
        audio=fp32(audio.hidden_states, cut.length, audio.hidden_size),
        pose=fp32(f, h, w, z),
        reference=fp32(1, h, w, z),
        motion=fp32(S2VConfig.MOTION, h, w, z),
        continued=fp32(),
    )
    size, later = (videos[0].height, videos[0].width), len(cut) - 1
    encoded = Counter({(1, *size): 2 * len(videos), (BEFORE, *size): 2 * later * len(videos)})
    if job.cfg.pose_video:
        encoded[1 + cut.length, *size] += len(cut)
    return Shapes({"adapter": speech}, +encoded)


def frames_of(
    vae: WanVAE, before: Float[np.ndarray, "b m h w c"], latents: Float[np.ndarray, "b f h w c"]
) -> Iterator[Float[Array, "b _ h1 w1 3"]]:
    """The frames of a clip in chunks, four for each latent: decoded after `before`, whose frames are dropped."""
    drop = vae.config.temporal_factor * (before.shape[1] - 1) + 1
    for chunk in vae.decode_chunks(parallel.put(np.concatenate([before, latents], axis=1), axes.BATCH)):
        if drop < chunk.shape[1]:
            yield chunk[:, drop:]
        drop = max(drop - chunk.shape[1], 0)


def latents_before(vae: WanVAE, frames: Float[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "m h2 w2 c"]:
    """The latents after which the next clip is made, of the last frames so far."""
    return fetch(vae.encode(parallel.put(frames[None, -BEFORE:])))[0]


def pose_latents(vae: WanVAE, frames: Float[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "m h2 w2 c"]:
    """The latents of a clip's pose: of all its frames after the first, which is repeated before it.

    Without a pose video the transformer is given zeros. Frames after the end of a pose video are black, -1.
    """
    return fetch(vae.encode(parallel.put(np.concatenate([frames[:1], frames])[None])))[0, 1:]


class Decoder:
    """Decodes the clips of some videos, one after another: the latents of a clip -> its frames, in chunks."""

    def __init__(self, vae: WanVAE, references: Float[np.ndarray, "b 1 h w c"], dropped: int) -> None:
        """`references` are the latents of the videos' images, `dropped` the first frames that are not shown."""
        self._vae, self._dropped = vae, dropped
        self._before: np.ndarray | None = references  # None: those of `_last`, not encoded yet
        self._last: np.ndarray | None = None

    def before(self) -> Float[np.ndarray, "b m h w c"]:
        """The latents of what is before the next clip: the images, or the last frames."""
        if self._before is None and self._last is not None:
            self._before = np.stack([latents_before(self._vae, frames) for frames in self._last])
        assert self._before is not None
        return self._before

    def __call__(self, latents: Float[np.ndarray, "b f h w c"]) -> Iterator[Float[Array, "b _ h1 w1 3"]]:
        made = []
        for chunk in frames_of(self._vae, self.before(), latents):
            yield chunk
            made.append(fetch(chunk))
        frames = np.concatenate(made, axis=1)
        if self._last is None:  # what is before the first frames shown is grey
            frames = np.pad(frames[:, self._dropped :], ((0, 0), (BEFORE, 0), (0, 0), (0, 0), (0, 0)))
        else:
            frames = np.concatenate([self._last, frames], axis=1)
        self._last, self._before = frames[:, -BEFORE:], None


def decoding(s: Session, vae: WanVAE, given: Inputs, videos: Sequence[Video]) -> Decoder:
    """See `Kind.decoding`."""
    references = np.stack([_encoded(vae, given.stills[_still(video)]) for video in videos])
    return Decoder(vae, references, s.job.segments.dropped)


class Performer:
    """Makes the fields of each clip; keeps the hidden states of the sound, and the VAE for the frames before a clip."""

    def __init__(self, s: Session, given: Inputs, by_prompt: Mapping[str, Any]) -> None:
        """`given` is the result of `read`."""
        del by_prompt
        self._stages, self._cut, self._pose = s.stages, s.job.segments, given.pose
        assert given.samples is not None
        encoder = s.load("audio_encoder")
        with s.stages("audio"):
            frames = len(self._cut) * self._cut.length
            self._audio = sound.encode(encoder, given.samples, s.job.cfg.fps, frames)
        del encoder
        self._vae: WanVAE = s.load("vae")
        self._posed = functools.cache(self._encode_pose)
        self._decoder: Decoder | None = None
        self._decoded: list[np.ndarray] = []  # the latents of the clips that it has decoded

    def fields(
        self, references: Float[Array, "b 1 h w c"], before: Sequence[Float[np.ndarray, "b f h w c"]]
    ) -> tuple[Fields, Fields]:
        """Fields of `Context` of the clip after those of `before` (latents), with the sound and in silence."""
        b, _, h, w, c = references.shape
        start = self._cut.starts[len(before)]
        audio = self._audio[:, start : start + self._cut.length]
        with self._stages("control"):
            motion = np.zeros((b, S2VConfig.MOTION, h, w, c), np.float32)
            if before:
                motion = self._after(references, before).before()
            pose = self._posed(len(before))
            if pose is None:
                pose = np.zeros((self._cut.length // self._vae.config.temporal_factor, h, w, c), np.float32)
            speech = Speech(
                audio=parallel.put(np.broadcast_to(audio, (b, *audio.shape))),
                pose=parallel.put(np.broadcast_to(pose, (b, *pose.shape))),
                reference=references,
                motion=parallel.put(motion),
                continued=parallel.put(np.full(b, bool(before), np.float32)),
            )
            jax.block_until_ready(speech)
        return {"adapter": speech}, {"adapter": speech._replace(audio=jnp.zeros_like(speech.audio))}

    def _encode_pose(self, segment: int) -> Float[np.ndarray, "f h w c"] | None:
        """The same for every batch."""
        if self._pose is None:
            return None
        start = self._cut.starts[segment]
        frames = self._pose.frames[start : start + self._cut.length]
        return pose_latents(self._vae, to_float(frames, *frames.shape[1:3]))

    def _after(
        self, references: Float[Array, "b 1 h w c"], before: Sequence[Float[np.ndarray, "b f h w c"]]
    ) -> Decoder:
        """The decoder of these videos after the clips of `before`; a run that goes on decodes them again."""
        known = bool(self._decoded) and len(self._decoded) <= len(before)
        if self._decoder is None or not (known and all(map(operator.is_, self._decoded, before))):
            self._decoder, self._decoded = Decoder(self._vae, fetch(references), self._cut.dropped), []
        for latents in before[len(self._decoded) :]:
            for _ in self._decoder(latents):
                pass
            self._decoded.append(latents)
        return self._decoder


KIND = Kind(read, encode, SEGMENT, shapes, performer=Performer, decoding=decoding)
