"""The image, the pose and the clips of an S2V transformer.

A video is made in clips of 80 frames: the first is decoded after the image's latent, which stands for one frame, each
later one after the latents of the 73 frames before it. The first three frames of the first clip are dropped, so that
the sound of a result begins three frames in.

Reference: wan/speech2video.py of the official repository.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.runtime.distributed import fetch

CLIP, BEFORE, DROPPED = 80, 73, 3  # frames


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


def frames_of(
    vae: WanVAE, before: Float[np.ndarray, "m h w c"], latents: Float[np.ndarray, "f h w c"]
) -> Iterator[Float[Array, "1 _ h1 w1 3"]]:
    """The frames of a clip in chunks, four for each latent: decoded after `before`, whose frames are dropped."""
    drop = vae.config.temporal_factor * (len(before) - 1) + 1
    for chunk in vae.decode_chunks(parallel.put(np.concatenate([before, latents])[None])):
        if drop < chunk.shape[1]:
            yield chunk[:, drop:]
        drop = max(drop - chunk.shape[1], 0)


def latents_before(vae: WanVAE, frames: Float[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "m h w c"]:
    """The latents after which the next clip is made, of the last frames so far."""
    return fetch(vae.encode(parallel.put(frames[None, -BEFORE:])))[0]


def pose_latents(vae: WanVAE, frames: Float[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "m h w c"]:
    """The latents of a clip's pose: of all its frames after the first, which is repeated before it.

    Without a pose video the transformer is given zeros. Frames after the end of a pose video are black, -1.
    """
    return fetch(vae.encode(parallel.put(np.concatenate([frames[:1], frames])[None])))[0, 1:]
