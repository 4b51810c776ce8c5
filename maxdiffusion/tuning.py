"""`cache_psnr=`: the largest threshold of a step cache that keeps a PSNR, found before the run."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
from jaxtyping import Float, UInt8

from maxdiffusion import conditioning, output
from maxdiffusion.denoise.experts import LoadedExperts
from maxdiffusion.media import frames
from maxdiffusion.media.similarity import psnr
from maxdiffusion.request import caching
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.sampling import Compiled, Sampler

log = logging.getLogger(__name__)

TRIALS = 6  # of thresholds; they part the range to 7 %
RANGE = 8.0  # the thresholds are up to so many times smaller and larger than the cache's own
STEPS = 10  # of a trial, from the first that may be left out
EXACT = -1.0  # the threshold that computes every step


def tuned(
    s: Session,
    conditions: conditioning.Conditioning,
    inputs: conditioning.Inputs,
    noise: Float[np.ndarray, "b f h w c"] | None,
    experts: LoadedExperts,
) -> tuple[Session, Compiled]:
    """The run with the threshold that `cache_psnr` asks for, and the programs that the search has compiled.

    A run of this command that was stopped has left it. Without `cache_psnr` the run itself. Arguments as of `search`.
    """
    compiled: Compiled = {}
    if s.job.cfg.cache_psnr is None:
        return s, compiled
    kept = output.Threshold(s.job)
    threshold = kept.read()
    if threshold is None:
        threshold = search(s, conditions, inputs, noise, experts, compiled)
        kept.keep(threshold)
    else:
        log.info("cache_threshold=%g, as a run of this command found it before it was stopped", threshold)
    setup = dataclasses.replace(s.setup, job=caching.with_threshold(s.job, threshold))
    return dataclasses.replace(s, setup=setup), compiled


def search(
    s: Session,
    conditions: conditioning.Conditioning,
    inputs: conditioning.Inputs,
    noise: Float[np.ndarray, "b f h w c"] | None,
    experts: LoadedExperts,
    compiled: Compiled,
) -> float:
    """The largest threshold with which the first steps predict a video of `cache_psnr`; `EXACT` where none does.

    The first batch's first segment is denoised for a few steps, exactly and with each threshold from the same noise,
    and the clean video that they predict is decoded. Of several videos the worst counts. Thresholds are bisected.

    Args:
      s: the run.
      conditions: its conditioning.
      inputs: the contents of its files.
      noise: as `Sampler` takes it.
      experts: the transformers.
      compiled: takes the programs, one for all thresholds.
    """
    asked, own = s.job.cfg.cache_psnr or 0.0, caching.threshold(s.job)
    compute = caching.computed(caching.with_threshold(s.job, math.inf), s.recipe)
    steps = min(len(compute), compute.index(False) + STEPS) if False in compute else len(compute)
    vae = s.load("vae")

    def trial(threshold: float) -> tuple[UInt8[np.ndarray, "b f h w c"], int]:
        setup = dataclasses.replace(s.setup, job=caching.with_threshold(s.job, threshold))
        quiet = dataclasses.replace(s, setup=setup, stages=Stages("off"))
        sampler = Sampler(quiet, conditions, noise, compiled=compiled)
        latents = sampler.predict(steps, experts)
        count = max(int(log[0][0, :steps].astype(bool).sum()) for log in sampler.logged.values())
        decode = conditioning.decoding(s, vae, inputs, tuple(sampler.logged))
        return np.concatenate(list(frames.in_bytes(decode(latents))), axis=1), count

    with s.stages("tune", TRIALS + 1, "trials") as advance:
        exact, _ = trial(EXACT)
        advance(1)
        lowest, highest, best = own / RANGE, own * RANGE, EXACT
        for _ in range(TRIALS):
            threshold = float(f"{math.sqrt(lowest * highest):.4g}")
            found, computed = trial(threshold)
            worst = min(map(psnr, exact, found))
            log.info(
                "cache_psnr=%g: cache_threshold=%g keeps %.1f dB and computes %d of the first %d steps",
                asked,
                threshold,
                worst,
                computed,
                steps,
            )
            if worst >= asked:
                lowest = best = threshold
            else:
                highest = threshold
            advance(1)
    if best == EXACT:
        log.warning(
            "cache_psnr=%g: no cache_threshold down to %g keeps it, so that every step is computed; give a smaller one",
            asked,
            highest,
        )
    return best
