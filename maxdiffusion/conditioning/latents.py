"""Latents that the user gives: noise to start from, or finished ones that only need decoding."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from jaxtyping import Float

from maxdiffusion.errors import UserError
from maxdiffusion.request import Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.paths import parse
from maxdiffusion.weights.latents_io import load_latents

# The videos of one batch and their latents.
Batch = tuple[tuple[Video, ...], Float[np.ndarray, "b f h w c"]]


@dataclasses.dataclass(frozen=True)
class Given:
    """The latents that the config names: at most one of the two."""

    noise: np.ndarray | None = None  # b f h w c, one row for each video
    finished: tuple[Batch, ...] = ()

    def of(self, rows: list[int]) -> Given:
        """Those of some rows of the job's videos."""
        return Given(None if self.noise is None else self.noise[rows], self.finished)

    def digest(self) -> str:
        """See `distributed.digest`."""
        noise = () if self.noise is None else (self.noise,)
        return distributed.digest([*noise, *(latents for _, latents in self.finished)])


def read(s: Session) -> Given:
    """Reads `initial_latents` or `decode_latents`.

    Raises:
      UserError: the file is damaged, or its latents are not those of the size that the config gives; on any host.
    """
    with distributed.fail_together():
        return _read(s)


def _read(s: Session) -> Given:
    cfg, cut = s.job.cfg, s.job.segments
    shape = s.job.latents_shape(s.configs["vae"].z_dim)
    if cfg.initial_latents:
        noisy = (len(s.job.videos), shape[0] + cut.reference_frames * len(cut), *shape[1:])
        return Given(noise=load_latents(parse(cfg.initial_latents), noisy)[0])
    if not cfg.decode_latents:
        return Given()
    latents, metadata = load_latents(parse(cfg.decode_latents))
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
    seed = int(metadata["seed"]) if re.fullmatch(r"\d{1,20}", metadata.get("seed", "")) else 0
    image = next(iter(cfg.image), None) if cut.dropped else None  # after whose latent the first segment is decoded
    video = Video(metadata.get("prompt", ""), "", seed, cfg.width, cfg.height, image=image)
    return Given(finished=tuple(((video,), one[None]) for one in latents))
