"""What an Animate transformer is conditioned on: a character's image, and the pose and face of someone who acts.

A long video is made in segments; each but the first repeats the last frames of the one before, which are given to it.
Reference: `diffusers.WanAnimatePipeline`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning import inputs
from maxdiffusion.conditioning.described import Described, Grid, full
from maxdiffusion.conditioning.images import read_originals
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import Example
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import to_float
from maxdiffusion.models.dit import Frames
from maxdiffusion.models.dit.animate import Performance
from maxdiffusion.models.vae import WanVAE
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

log = logging.getLogger(__name__)

PERFORMANCE = "performance"
FACE = 512  # pixels of the official checkpoint's faces; any other square will do

Fields = dict[str, Any]
# (fields of `Context` so far, latents of the parts made already) -> those of the next part, with and without a face.
Perform = Callable[[Fields, Sequence[Float[np.ndarray, "b f h w c"]]], tuple[Fields, Fields]]


def still(fields: Fields, before: Sequence[np.ndarray]) -> tuple[Fields, Fields]:
    """Nobody acts: the fields are all there is."""
    return fields, fields


class Inputs(NamedTuple):
    """The contents of the files, `num_frames` each, in their own sizes; background and mask in replace mode only."""

    characters: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
    pose: UInt8[np.ndarray, "f _ _ 3"]
    face: UInt8[np.ndarray, "f _ _ 3"]
    background: UInt8[np.ndarray, "f _ _ 3"] | None
    mask: UInt8[np.ndarray, "f _ _ 3"] | None


def read(cfg: Config, videos: Sequence[Example]) -> Inputs:
    """What `image`, `pose_video`, `face_video` and, to replace, `background_video` and `mask_video` name.

    Raises:
      UserError: an image is too narrow; see also `inputs.one_size`, `inputs.video` and `open_image`.
    """
    frames, size = cfg.num_frames, inputs.one_size(cfg, videos)
    pose = inputs.video("pose_video", str(cfg.pose_video), frames, *size)
    face = inputs.video("face_video", str(cfg.face_video), frames, FACE, FACE, sized=False)
    background = mask = None
    if cfg.mode == "replace":
        background = inputs.video("background_video", str(cfg.background_video), frames, *size)
        mask = inputs.video("mask_video", str(cfg.mask_video), frames, *size, ("background_video", background))
        background, mask = background[:frames], mask[:frames]
    characters = read_originals(cfg, videos) or {}
    for at, image in characters.items():
        (own_height, own_width, _), (h, w) = image.shape, inside(image, *size)
        if not min(h, w):
            raise UserError(
                f"image={at} is {own_width} wide x {own_height} high, of which nothing is left within {size[1]} x "
                f"{size[0]}; give an image that is not as narrow."
            )
        log.info("image %s: %d x %d pixels, made %d x %d on black", at, own_width, own_height, w, h)
    return Inputs(characters, pose[:frames], face[:frames], background, mask)


def encode(
    cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Inputs
) -> list[Float[Array, "1 h w z"]]:
    """The latents of each video's character."""
    vae = stages.load(nets, "vae")
    with stages("image"):
        latents = {}
        for at, image in given.characters.items():
            shown = to_float(on_black(image, cfg.height, cfg.width)[None], cfg.height, cfg.width)
            latents[at] = jax.block_until_ready(vae.encode(parallel.put(shown[None]))[0])
    return [latents[str(video.image)] for video in videos]


def described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`. It counts a pose for each video, though those of one batch share it."""
    (f, h, w), vae, plan = grid, configs["vae"], parts.of(cfg)
    square = configs["transformer"].adapter.motion_encoder_size
    shown = Frames(channels=full(1 + f, h, w, vae.temporal_factor + vae.z_dim))
    performance = Performance(full(f, h, w, vae.z_dim), full(plan.length, square, square, 3))
    size, characters = (cfg.height, cfg.width), {video.image for video in videos}
    encoded = Counter({(plan.length, *size): 2 * len(plan.starts) * len(videos)})
    return Described({"frames": shown, "adapter": performance}, encoded + Counter({(1, *size): len(characters)}))


def performer(cfg: Config, nets: Nets, stages: Stages, given: Inputs) -> Perform:
    """What is shown in each part; the VAE stays, for the frames that a part hands on to the next."""
    vae, plan, size = stages.load(nets, "vae"), parts.of(cfg), (cfg.height, cfg.width)
    square = nets.configs["transformer"].adapter.motion_encoder_size

    def perform(fields: Fields, before: Sequence[np.ndarray]) -> tuple[Fields, Fields]:
        frames = plan.of(plan.starts[len(before)])
        characters = fields.pop(PERFORMANCE)
        shown, unknown = np.zeros((len(frames), *size, 3), np.float32), np.ones((len(frames), *size), np.float32)
        if given.background is not None and given.mask is not None:
            shown, unknown = to_float(given.background[frames], *size), to_grey(given.mask[frames], *size)
        with stages("control"):
            pose = vae.encode(parallel.put(to_float(given.pose[frames], *size)[None]))
            channels = []
            for row, character in enumerate(characters):
                if before:
                    shown[: plan.carried] = _last_frames(vae, before[-1][row], plan.carried)
                channels.append(given_channels(vae, character, shown, unknown, plan.carried if before else 0))
            face = parallel.put(to_float(given.face[frames], square, square)[None])
            face, pose = (jnp.broadcast_to(x, (len(characters), *x.shape[1:])) for x in (face, pose))
            fields |= {"frames": Frames(channels=jnp.stack(channels))}
            acting, blank = (Performance(pose, pixels) for pixels in (face, jnp.full_like(face, -1)))
            return fields | {"adapter": acting}, fields | {"adapter": blank}

    return perform


def _last_frames(vae: WanVAE, latents: Float[np.ndarray, "f h w c"], count: int) -> Float[np.ndarray, "count h1 w1 3"]:
    """The end of what these latents show; chunk by chunk, as a decoder does not start in the middle."""
    kept = np.zeros((0, 1, 1, 3), np.float32)
    for chunk in vae.decode_chunks(parallel.put(latents[None])):
        frames = distributed.fetch(chunk)[0]
        kept = np.concatenate([kept.reshape(-1, *frames.shape[1:]), frames])[-count:]
    return kept


def to_grey(frames: UInt8[np.ndarray, "f h1 w1 3"], height: int, width: int) -> Float[np.ndarray, "f h w"]:
    """0..1, each frame resized and made grey as PIL does both."""
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(image.convert("L"), np.float32) for image in images]) / np.float32(255)


def inside(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int) -> tuple[int, int]:
    """Height and width of an image as large as it fits, proportions kept."""
    h, w = image.shape[:2]
    return (h * width // w, width) if width / height < w / h else (height, w * height // h)


def on_black(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image as large as it fits, its proportions kept, in the middle of black.

    Reference: `WanAnimateImageProcessor`, which asks for bilinear resizing, but whose base class sets Lanczos again.
    """
    h, w = inside(image, height, width)
    canvas = Image.new("RGB", (width, height))
    resized = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
    canvas.paste(resized, (width // 2 - w // 2, height // 2 - h // 2))
    return np.asarray(canvas)


def mask_channels(mask: Float[np.ndarray, "f h w"], frames_in_one: int) -> Float[np.ndarray, "f2 h w c"]:
    """The frames that fall into each latent frame as its channels, the first frame as often as it takes to fill one."""
    frames = np.concatenate([np.repeat(mask[:1], frames_in_one, axis=0), mask[1:]])
    return frames.reshape(-1, frames_in_one, *mask.shape[1:]).transpose(0, 2, 3, 1)


def given_channels(
    vae: WanVAE,
    character: Float[Array, "1 h2 w2 z"],
    shown: Float[np.ndarray, "f h w 3"],
    unknown: Float[np.ndarray, "f h w"],
    known: int,
) -> Float[Array, "f2 h2 w2 c"]:
    """What is concatenated to the latents' channels: which pixels are given, and what they show; fp32.

    Args:
      vae: the encoder.
      character: latents of its image, all of it given, the first frame of the result.
      shown: [-1, 1], frames carried over, background, or 0.
      unknown: 0..1, what the character is to replace; 1 everywhere in animate mode.
      known: so many first frames are given whole.
    """
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    given = 1 - unknown[:, ::s, ::s]  # "nearest" takes the first pixel of each square
    given[:known] = 1
    segment = jnp.concatenate([mask_channels(given, t), vae.encode(parallel.put(shown[None]))[0]], axis=-1)
    return jnp.concatenate([jnp.pad(character, ((0, 0),) * 3 + ((t, 0),), constant_values=1.0), segment])
