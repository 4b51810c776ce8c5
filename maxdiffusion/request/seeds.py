"""Seeds that the user leaves to chance: -1 stands for one that is drawn when the run starts."""

from __future__ import annotations

import dataclasses
import logging
import secrets

from maxdiffusion.request.job import Job
from maxdiffusion.runtime import distributed

log = logging.getLogger(__name__)


def drawn(job: Job) -> Job:
    """The run with a seed for every video whose seed is -1: process 0's on all processes, logged and recorded."""
    rows = [row for row, video in enumerate(job.videos) if video.seed < 0]
    if not rows or job.cfg.decode_latents:
        return job
    videos = list(job.videos)
    seeds = distributed.on_process_0(lambda: [secrets.randbelow(2**32) for _ in rows])
    for row, seed in zip(rows, seeds, strict=True):
        videos[row] = dataclasses.replace(videos[row], seed=seed, drawn=True)
        log.info("seed=-1: drew %d for %.60s", seed, videos[row].output or videos[row].prompt)
    cfg = job.cfg
    if cfg.prompts is None:
        cfg = cfg.model_copy(update={"seed": tuple(video.seed for video in videos)})
    return dataclasses.replace(job, cfg=cfg, videos=tuple(videos))
