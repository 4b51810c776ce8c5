"""Conversion between 8-bit frames and float video, as in the reference."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import distributed


def resized(frame: UInt8[np.ndarray, "h1 w1 c"], height: int, width: int) -> UInt8[np.ndarray, "h w c"]:
    """The frame resized by PIL's Lanczos filter; itself where it has that size."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def covering(frame: UInt8[np.ndarray, "h1 w1 c"], height: int, width: int) -> UInt8[np.ndarray, "h w c"]:
    """The frame resized by PIL's bicubic filter to cover the size, then cropped in the middle.

    Reference: `VaceVideoProcessor.resize_crop` of Wan2.1, whose filter is torch's antialiased one: PIL's differs from
    it by 1 in at most 1 % of values, rarely by 2 (measured, torch 2.13).
    """
    if frame.shape[:2] == (height, width):
        return frame
    scale = max(width / frame.shape[1], height / frame.shape[0])
    h, w = (round(scale * side) for side in frame.shape[:2])
    top, left = (h - height) // 2, (w - width) // 2
    whole = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))
    return whole[top : top + height, left : left + width]


def letterboxed(
    frame: UInt8[np.ndarray, "h1 w1 c"],
    height: int,
    width: int,
    filter: Image.Resampling = Image.Resampling.BILINEAR,
) -> UInt8[np.ndarray, "h w c"]:
    """The frame scaled to fit by a PIL filter, proportions kept, centred on black.

    Reference: diffusers' `WanAnimate2VideoProcessor`.

    Raises:
      UserError: nothing of it would be left.
    """
    h, w, channels = frame.shape
    rows, columns = between_bars((w, h), height, width)
    canvas = np.zeros((height, width, channels), np.uint8)
    size = columns.stop - columns.start, rows.stop - rows.start
    canvas[rows, columns] = np.asarray(Image.fromarray(frame).resize(size, filter))
    return canvas


def between_bars(size: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that `letterboxed` gives to a picture of that size (width, height).

    Raises:
      UserError: there are none.
    """
    w, h = size
    wide = width * h < w * height
    inner_h, inner_w = (h * width // w, width) if wide else (height, w * height // max(h, 1))
    if not min(inner_h, inner_w):
        raise UserError(f"A picture of {w} x {h} pixels within {width} x {height} has no pixel left; crop it.")
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    return slice(top, top + inner_h), slice(left, left + inner_w)


def to_float(frames: UInt8[np.ndarray, "f h1 w1 c"], height: int, width: int) -> Float[np.ndarray, "f h w c"]:
    """Resize frames of another size by PIL's Lanczos filter, then map 0..255 to [-1, 1] in float32.

    Reference: diffusers `VideoProcessor.preprocess_video`.
    """
    if frames.shape[1:3] != (height, width):
        frames = np.stack([resized(frame, height, width) for frame in frames])
    return frames.astype(np.float32) / np.float32(255) * 2 - 1


def as_mask(frames: UInt8[np.ndarray, "f h w 4"]) -> UInt8[np.ndarray, "f h w 3"]:
    """The mask in RGBA frames: their alpha where any pixel of the clip is transparent, else their colours."""
    alpha = frames[..., 3:]
    return frames[..., :3] if alpha.min() == 255 else np.repeat(alpha, 3, axis=-1)


def to_uint8(
    video: Float[Array | np.ndarray, "*b f h w c"], instead: str = "try vae_dtype=float32"
) -> UInt8[np.ndarray, "*b f h w c"]:
    """Map [-1, 1] to 0..255: (x / 2 + 0.5) clamped to [0, 1], times 255, rounded half to even, in float32.

    Runs on the device, so that a quarter of the bytes go to the host. Reference: diffusers
    `VaeImageProcessor.denormalize` and `numpy_to_pil` (its `export_to_video` truncates arrays, but rounds PIL images).

    Raises:
      UserError: there are NaNs; `instead` is the end of the sentence.
    """
    frames, undefined = _quantise(video)
    if undefined:
        raise UserError(f"the decoded video has {int(undefined)} NaN values, though its latents have none; {instead}.")
    return distributed.fetch(frames)


@jax.jit
def _quantise(video: jax.Array) -> tuple[jax.Array, jax.Array]:
    video = video.astype(jnp.float32)
    unit = jnp.clip(video * 0.5 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255.0).astype(jnp.uint8), jnp.isnan(video).sum()


def in_bytes(
    chunks: Iterable[Float[Array, "b f h w c"]],
    advance: Callable[[int], object] = lambda frames: None,
    instead: str = "try vae_dtype=float32",
    there: UInt8[np.ndarray, "b before h w c"] | None = None,
) -> Iterator[UInt8[np.ndarray, "b f h w c"]]:
    """The chunks of `WanVAE.decode_chunks` as 8-bit frames on the host.

    Args:
      chunks: float, after the frames that are `there`.
      advance: called with the number of frames of each chunk.
      instead: as in `to_uint8`.
      there: the first frames, decoded before: a chunk of their own.
    """
    if there is not None:
        advance(there.shape[1])
        yield there
    for chunk in chunks:
        frames = to_uint8(chunk, instead)
        advance(frames.shape[1])
        yield frames
