"""The conditioning of an Animate transformer: a character's image, and the pose and face of an actor.

A long video is made in segments; each but the first starts from the last frames of the one before.
References: wan/animate.py of the official repository, and `diffusers.WanAnimatePipeline`.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video
from maxdiffusion.conditioning.control_video import ControlVideo
from maxdiffusion.conditioning.image import Originals, encode_tokens, read_originals, token_shapes
from maxdiffusion.conditioning.kind import SEGMENT, Grid, Images, Kind, Shapes, fp32
from maxdiffusion.conditioning.overlap import last_frames
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import to_float
from maxdiffusion.media.resize import bilinear
from maxdiffusion.models.dit.animate import Performance
from maxdiffusion.models.dit.context import Frames
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed

log = logging.getLogger(__name__)

FACE = 512  # pixels of the official checkpoint's faces; any other square will do

Fields = dict[str, Any]
Resizing = Literal["bilinear", "lanczos"]  # `Conventions.character`


class Inputs(NamedTuple):
    """The characters on black, and videos in the result's size but for faces; background and mask to replace only."""

    characters: Mapping[str, UInt8[np.ndarray, "h w 3"]]
    pose: ControlVideo
    face: ControlVideo
    background: ControlVideo | None
    mask: ControlVideo | None


def read(job: Job, images: Images) -> Inputs:
    """The contents of `image`, `pose_video`, `face_video` and, to replace, `background_video` and `mask_video`.

    Raises:
      UserError: an image is too narrow; see also `control_video` and `open_image`.
    """
    cfg = job.cfg
    size = control_video.one_size(job)
    pose = control_video.read(cfg, "pose_video", str(cfg.pose_video), *size)
    face = control_video.read(cfg, "face_video", str(cfg.face_video), FACE, FACE, sized=False)
    background = mask = None
    if cfg.mode == "replace":
        background = control_video.read(cfg, "background_video", str(cfg.background_video), *size)
        mask = control_video.read(cfg, "mask_video", str(cfg.mask_video), *size, background)
    characters = _characters(images, *size, job.conventions.character)
    for at, image in images.items():
        _, _, h, w = box((image.height, image.width), *size, job.conventions.character)
        log.info(
            "image %s: %d x %d pixels, made %d x %d on black (%s)",
            *(at, image.width, image.height, w, h, job.conventions.character),
        )
    return Inputs(characters, pose, face, background, mask)


def _characters(images: Images, height: int, width: int, how: Resizing) -> dict[str, np.ndarray]:
    for at, image in images.items():
        if not min(box((image.height, image.width), height, width, how)[2:]):
            raise UserError(
                f"image={at} is {image.width} wide x {image.height} high, of which nothing is left within {width} x "
                f"{height}; give an image that is not as narrow."
            )
    return {at: on_black(np.asarray(image), height, width, how) for at, image in images.items()}


def read_seen(job: Job, images: Images) -> Originals | None:
    """The images that CLIP sees: the official code shows it the character on black, diffusers the original."""
    if job.conventions.clip_view == "centre":
        return read_originals(job, images)
    return _characters(images, *control_video.one_size(job), job.conventions.character) or None


def encode(s: Session, given: Inputs) -> list[Float[np.ndarray, "1 h w z"]]:
    """The latents of each video's character."""
    return encode_characters(s, given.characters)


def encode_characters(
    s: Session, characters: Mapping[str, UInt8[np.ndarray, "h w 3"]]
) -> list[Float[np.ndarray, "1 h2 w2 z"]]:
    """The latents of the image of each video, of the images by location."""
    vae, size = s.load("vae"), (s.job.cfg.height, s.job.cfg.width)
    with s.stages("image"):
        latents = {}
        for at, image in characters.items():
            pixels = to_float(image[None], *size)
            latents[at] = distributed.fetch(vae.encode(parallel.put(pixels[None])))[0]
    return [latents[str(video.image)] for video in s.job.videos]


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`. It counts a pose for each video, though those of one batch share it."""
    (f, h, w), vae, cut = grid, configs["vae"], job.segments
    square = configs["transformer"].adapter.motion_encoder_size
    frames = Frames(channels=fp32(1 + f, h, w, vae.temporal_factor + vae.z_dim))
    performance = Performance(fp32(f, h, w, vae.z_dim), fp32(cut.length, square, square, 3))
    size, characters = (job.cfg.height, job.cfg.width), {video.image for video in videos}
    encoded = Counter({(cut.length, *size): len(cut) * (1 + len(videos))})
    return Shapes({"frames": frames, "adapter": performance}, encoded + Counter({(1, *size): len(characters)}))


class Performer:
    """Makes the fields of each segment; keeps the VAE, for the frames that a segment hands on to the next."""

    def __init__(self, s: Session, given: Inputs, by_prompt: Mapping[str, Any]) -> None:
        """`given` is the result of `read`."""
        del by_prompt
        self._stages, self._segments, self._given = s.stages, s.job.segments, given
        self._vae: WanVAE = s.load("vae")
        self._size = s.job.cfg.height, s.job.cfg.width
        self._square = s.configs["transformer"].adapter.motion_encoder_size
        self._acted = functools.cache(self._act)

    def _act(self, segment: int) -> tuple[jax.Array, jax.Array]:
        """Latents of the pose, and the face in pixels: the same for every batch and expert."""
        frames = self._segments.frames_of(self._segments.starts[segment])
        pose = self._vae.encode(parallel.put(to_float(self._given.pose.frames[frames], *self._size)[None]))
        face = parallel.put(to_float(self._given.face.frames[frames], self._square, self._square)[None])
        return pose, face

    def fields(
        self,
        characters: Float[Array, "b 1 h w z"],
        before: Sequence[Float[np.ndarray, "b f h w c"]],
    ) -> tuple[Fields, Fields]:
        """Fields of `Context` of the segment after those of `before` (latents), with and without a face."""
        vae, given, overlap = self._vae, self._given, self._segments.overlap
        frames = self._segments.frames_of(self._segments.starts[len(before)])
        shown, unknown = (
            np.zeros((len(frames), *self._size, 3), np.float32),
            np.ones((len(frames), *self._size), np.float32),
        )
        if given.background is not None and given.mask is not None:
            shown = to_float(given.background.frames[frames], *self._size)
            unknown = to_grey(given.mask.frames[frames], *self._size)
        with self._stages("control"):
            channels = []
            for row, character in enumerate(characters):
                if before:
                    shown[:overlap] = last_frames(vae, before[-1][row], overlap)
                channels.append(given_channels(vae, character, shown, unknown, overlap if before else 0))
            pose, face = (jnp.broadcast_to(x, (len(characters), *x.shape[1:])) for x in self._acted(len(before)))
            both = {"frames": Frames(channels=jnp.stack(channels))}
            acting, blank = (Performance(pose, pixels) for pixels in (face, jnp.full_like(face, -1)))
            return {**both, "adapter": acting}, {**both, "adapter": blank}


KIND = Kind(read, encode, SEGMENT, shapes, performer=Performer)
TOKENS = Kind(read_seen, encode_tokens, "image", token_shapes)


def to_grey(frames: UInt8[np.ndarray, "f h1 w1 3"], height: int, width: int) -> Float[np.ndarray, "f h w"]:
    """Frames resized and converted to grey by PIL, in 0..1."""
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(image.convert("L"), np.float32) for image in images]) / np.float32(255)


def box(own: tuple[int, int], height: int, width: int, how: Resizing) -> tuple[int, int, int, int]:
    """Top, left, height and width of an image of `own` height and width on a canvas: as large as it fits, centred."""
    h, w = own
    if how == "bilinear":  # in the floating-point order of `padding_resize`
        h, w = (height, int(height / h * w)) if h / w > height / width else (int(width / w * h), width)
        return (height - h) // 2, (width - w) // 2, h, w
    h, w = (h * width // w, width) if width / height < w / h else (height, w * height // h)
    return height // 2 - h // 2, width // 2 - w // 2, h, w


def on_black(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int, how: Resizing) -> UInt8[np.ndarray, "h w 3"]:
    """The image scaled to fit, proportions kept, centred on black.

    References: `WanAnimate.padding_resize`, bilinear by OpenCV; diffusers' `WanAnimateImageProcessor`, which asks for
    bilinear resizing too, but whose base class sets Lanczos again.
    """
    top, left, h, w = box(image.shape[:2], height, width, how)
    if how == "bilinear":
        resized = bilinear(image, h, w)
    else:
        resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS))
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + h, left : left + w] = resized
    return canvas


def mask_channels(mask: Float[np.ndarray, "f h w"], frames_in_one: int) -> Float[np.ndarray, "f2 h w c"]:
    """Folds the frames of each latent frame into channels; the first frame is repeated to fill one."""
    frames = np.concatenate([np.repeat(mask[:1], frames_in_one, axis=0), mask[1:]])
    return frames.reshape(-1, frames_in_one, *mask.shape[1:]).transpose(0, 2, 3, 1)


def given_channels(
    vae: WanVAE,
    character: Float[Array, "1 h2 w2 z"],
    shown: Float[np.ndarray, "f h w 3"],
    unknown: Float[np.ndarray, "f h w"],
    known: int,
) -> Float[Array, "f2 h2 w2 c"]:
    """The additional input channels: the mask of given pixels, then their latents; fp32.

    Args:
      vae: the encoder.
      character: latents of its image, all of it given, the first frame of the result.
      shown: [-1, 1], frames carried over, background, or 0.
      unknown: 0..1, the region that the character replaces; 1 everywhere in animate mode.
      known: number of first frames given whole.
    """
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    given = 1 - unknown[:, ::s, ::s]  # "nearest" takes the first pixel of each square
    given[:known] = 1
    segment = jnp.concatenate([mask_channels(given, t), vae.encode(parallel.put(shown[None]))[0]], axis=-1)
    return jnp.concatenate([jnp.pad(character, ((0, 0),) * 3 + ((t, 0),), constant_values=1.0), segment])
