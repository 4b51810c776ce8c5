"""The last frames of a segment, from which the next one starts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from maxdiffusion import parallel
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.runtime import distributed


def last_frames(vae: WanVAE, latents: Float[np.ndarray, "f h w c"], count: int) -> Float[np.ndarray, "count h1 w1 3"]:
    """The last frames of these latents; decoded chunk by chunk, as a causal decoder cannot start in the middle."""
    kept = np.zeros((0, 1, 1, 3), np.float32)
    for chunk in vae.decode_chunks(parallel.put(latents[None])):
        frames = distributed.fetch(chunk)[0]
        kept = np.concatenate([kept.reshape(-1, *frames.shape[1:]), frames])[-count:]
    return kept
