"""The control of a VACE transformer: a video, a mask of pixels to generate, and reference images.

References: wan/vace.py of Wan2.1 (`prepare_source`, `vace_encode_frames`, `vace_encode_masks`), and
`diffusers.WanVACEPipeline` (`preprocess_conditions`, `prepare_video_latents`, `prepare_masks`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video
from maxdiffusion.conditioning.control_video import ControlVideo
from maxdiffusion.conditioning.kind import Grid, Images, Kind, Shapes, fp32
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image
from maxdiffusion.media.frames import to_float
from maxdiffusion.models.dit.vace import Control
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The contents of the files."""

    video: ControlVideo | None
    mask: ControlVideo | None  # from half of white on generated
    references: tuple[Float[np.ndarray, "h w 3"], ...]  # [-1, 1], in the order of the frame axis


def read(job: Job, images: Images) -> Inputs:
    """The contents of `video`, `mask` and `reference_images`; without a video or a mask all is generated.

    Raises:
      UserError: an image is too small or narrow; see also `control_video` and `open_image`.
    """
    cfg = job.cfg
    size = control_video.one_size(job)
    how: dict[str, Any] = {"fit": job.conventions.control_resize}
    if cfg.input_frames == "spread" and cfg.video:
        how["at"] = control_video.wanted(cfg, *filter(None, (cfg.video, cfg.mask)))
    video = control_video.read(cfg, "video", cfg.video, *size, **how) if cfg.video else None
    mask = control_video.read(cfg, "mask", cfg.mask, *size, video, **how) if cfg.mask else None
    paths, step = cfg.reference_images, 1
    if job.conventions.references == "reversed":
        paths, step = paths[::-1], job.spec.vae_stride[1]
    references = (on_canvas(_reference(path, *size, step), *size, step) for path in paths)
    return Inputs(video, mask, tuple(np.asarray(canvas) for canvas in references))


def _reference(path: str, height: int, width: int, step: int) -> UInt8[np.ndarray, "_ _ 3"]:
    image = np.asarray(open_image(path, "white"))  # what is transparent, as official wan/utils/vace_processor.py
    (own_height, own_width, _), (_, (h, w)) = image.shape, _sizes(image, height, width, step)
    if not min(h, w):
        raise UserError(
            f"reference_images={path} is {own_width} wide x {own_height} high, of which nothing is left in multiples "
            f"of {step} within {width} x {height}; give an image that is not as small or narrow."
        )
    log.info("reference image %s: %d x %d pixels, made %d x %d on white", path, own_width, own_height, w, h)
    return image


def _sizes(
    image: UInt8[np.ndarray, "_ _ 3"], height: int, width: int, step: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image in multiples of `step`, and of those as large as they fit, proportions kept."""
    h, w = (side - side % step for side in image.shape[:2])
    scale = min(height / max(h, 1), width / max(w, 1))
    return (h, w), (int(h * scale), int(w * scale))


def encode(s: Session, given: Inputs) -> list[Control]:
    """One control for all videos.

    Raises:
      UserError: `conditioning_scale` has neither one entry nor one for each layer with a hint.
    """
    layers, cfg = s.configs["transformer"].adapter.vace_layers, s.job.cfg
    if len(cfg.conditioning_scale) not in (1, len(layers)):
        raise UserError(
            f"conditioning_scale has {len(cfg.conditioning_scale)} entries, but this transformer takes "
            f"{len(layers)} hints; write one for all, or {len(layers)}."
        )
    scale: Any = np.broadcast_to(np.asarray(cfg.conditioning_scale, np.float32), (len(layers),))
    vae, size = s.load("vae"), (cfg.height, cfg.width)
    video = (
        np.zeros((cfg.num_frames, *size, 3), np.float32) if given.video is None else to_float(given.video.frames, *size)
    )
    mask = np.ones_like(video) if given.mask is None else (to_float(given.mask.frames, *size) + 1) / 2
    with s.stages("control"):
        latents: Any = distributed.fetch(control_latents(vae, video, mask, given.references))
        control = Control(latents, scale)
    return [control] * len(s.job.videos)


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    (f, h, w), vae, images = grid, configs["vae"], len(job.cfg.reference_images)
    latents = fp32(images + f, h, w, 2 * vae.z_dim + vae.spatial_factor**2)
    control = Control(latents, fp32(len(configs["transformer"].adapter.vace_layers)))
    size = (job.cfg.height, job.cfg.width)
    return Shapes({"adapter": control}, Counter({(1, *size): images}) + Counter({(job.cfg.num_frames, *size): 2}))


KIND = Kind(read, encode, "adapter", shapes)


def on_canvas(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int, step: int) -> Float[Array, "h w 3"]:
    """The image, scaled to fit, proportions kept, centred on white; [-1, 1].

    Both references scale bilinearly without antialiasing, but diffusers first resizes to multiples of `step`, the VAE's
    stride; the official code does not, which is a `step` of 1.
    """
    own, (h, w) = _sizes(image, height, width, step)
    resized = jax.image.resize(jnp.asarray(to_float(image[None], *own)[0]), (h, w, 3), "bilinear", antialias=False)
    top, left = (height - h) // 2, (width - w) // 2
    return jnp.ones((height, width, 3)).at[top : top + h, left : left + w].set(resized)


def mask_channels(mask: Float[Array, "f h w"], frames: int, stride: tuple[int, int, int]) -> Float[Array, "f2 h2 w2 c"]:
    """Each latent pixel's square of mask pixels as channels, of the frame nearest to each latent frame's middle."""
    f, h, w = mask.shape
    _, down, across = stride
    nearest = np.floor((np.arange(frames) + 0.5) * (f / frames)).astype(int)
    squares = mask[nearest].reshape(frames, h // down, down, w // across, across)
    return squares.transpose(0, 1, 3, 2, 4).reshape(frames, h // down, w // across, down * across)


def control_latents(
    vae: WanVAE,
    video: Float[np.ndarray, "f h w 3"],
    mask: Float[np.ndarray, "f h w 3"],
    references: Sequence[Float[np.ndarray, "h w 3"]],
) -> Float[Array, "f2 h2 w2 c"]:
    """Channels: inactive (kept) latents, reactive (generated) latents, then the mask; fp32.

    The references' latents come first on the frame axis, in their order, with zeros in the other channels.

    Args:
      vae: the encoder.
      video: [-1, 1].
      mask: 0..1, from 0.5 on generated.
      references: [-1, 1].
    """
    anew = (mask > 0.5).astype(np.float32)
    kept, made = (vae.encode(parallel.put(part[None]))[0] for part in (video * (1 - anew), video * anew))
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    channels = mask_channels(jnp.asarray(mask[..., 0]), kept.shape[0], (t, s, s))
    before = [vae.encode(parallel.put(canvas[None, None]))[0] for canvas in references]
    padded = [jnp.pad(latents, ((0, 0),) * 3 + ((0, made.shape[-1] + channels.shape[-1]),)) for latents in before]
    return jnp.concatenate([*padded, jnp.concatenate([kept, made, channels], axis=-1)])
