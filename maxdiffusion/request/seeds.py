"""Seeds that the user leaves to chance: -1 stands for one that is drawn when the run starts."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets

from maxdiffusion.request.job import Job
from maxdiffusion.runtime import distributed

log = logging.getLogger(__name__)


def number() -> str:
    """A random number, 16 hexadecimal digits, from which all seeds of a run follow."""
    return secrets.token_hex(8)


def drawn(job: Job, draw: str | None = None) -> Job:
    """The run with a seed for every video whose seed is -1: the same on all processes, logged and recorded.

    They follow from `draw`, by default process 0's new `number`, and the video's name in a prompt file or its place.
    """
    rows = [row for row, video in enumerate(job.videos) if video.seed < 0]
    if not rows or job.cfg.decode_latents:
        return job
    videos = list(job.videos)
    draw = draw or distributed.on_process_0(number)
    for row in rows:
        name = videos[row].output or row
        seed = int.from_bytes(hashlib.sha256(f"{draw} {name}".encode(errors="surrogateescape")).digest()[:4])
        videos[row] = dataclasses.replace(videos[row], seed=seed, drawn=True)
        log.info("seed=-1: drew %d for %.60s", seed, videos[row].output or videos[row].prompt)
    cfg = job.cfg
    if cfg.prompts is None:
        cfg = cfg.model_copy(update={"seed": tuple(video.seed for video in videos)})
    return dataclasses.replace(job, cfg=cfg, videos=tuple(videos))
