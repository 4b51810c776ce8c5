"""Latents that the user gives: noise to start from, or finished ones that only need decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import numpy as np
from jaxtyping import Float

from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import Example, examples
from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import parse
from maxdiffusion.weights.latents_io import load_latents

# The videos of one batch and their latents.
Batch = tuple[tuple[Example, ...], Float[np.ndarray, "b f h w c"]]


@dataclasses.dataclass(frozen=True)
class Given:
    """What the files named in the config hold: at most one of the two."""

    noise: np.ndarray | None = None  # b f h w c, one row for each video
    finished: tuple[Batch, ...] = ()

    def digest(self) -> str:
        """Of all numbers."""
        arrays = [*(() if self.noise is None else (self.noise,)), *(latents for _, latents in self.finished)]
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def read(cfg: Config, shape: tuple[int, int, int, int]) -> Given:
    """Reads `initial_latents` or `decode_latents`; `shape` is f h w c of one video's latents.

    Raises:
      UserError: the file is damaged, or its latents are not those of the size that the config asks for.
    """
    if cfg.initial_latents:
        plan = parts.of(cfg)
        noisy = (len(examples(cfg)), shape[0] + plan.leading * len(plan.starts), *shape[1:])
        return Given(noise=load_latents(parse(cfg.initial_latents), noisy)[0])
    if not cfg.decode_latents:
        return Given()
    latents, told = load_latents(parse(cfg.decode_latents))
    if latents.shape[1:] != shape:
        f, h, w, c = latents.shape[1:]
        raise UserError(
            f"{cfg.decode_latents} holds latents of {f} frames x {h} high x {w} wide x {c} channels, but "
            f"width={cfg.width} height={cfg.height} num_frames={cfg.num_frames} make {' x '.join(map(str, shape))}; "
            "give the width, height and num_frames that they were made with."
        )
    if cfg.save_file and len(latents) > 1:
        raise UserError(
            f"save_file names one file, but {cfg.decode_latents} holds {len(latents)} videos; leave it out."
        )
    seed = int(told["seed"]) if re.fullmatch(r"\d{1,20}", told.get("seed", "")) else 0
    video = Example(told.get("prompt", ""), "", seed, cfg.width, cfg.height)
    return Given(finished=tuple(((video,), one[None]) for one in latents))
