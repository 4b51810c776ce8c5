"""The main program: a run, from inputs to videos."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from maxdiffusion import conditioning, output, sampling, tuning
from maxdiffusion.conditioning import latents
from maxdiffusion.denoise.experts import LoadedExperts
from maxdiffusion.media import frames
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video, fitting, session
from maxdiffusion.runtime import stop
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.runtime.versions import versions

logger = logging.getLogger(__name__)


def run(job: Job) -> list[AnyPath]:
    """Makes every video of `job` and returns their paths; of a prompt file, those that do not exist yet.

    Raises:
      UserError: the checkpoint, the devices or the disk do not allow it; finished videos stay.
    """
    session.start(job)  # log, hosts, compile cache
    output.Gallery(job).write()  # of the videos that exist; a run that was stopped may have left it behind them
    with output.drawn(output.remaining(job)) as job:  # seeds
        return make(job) if job.videos else []


def make(job: Job) -> list[AnyPath]:
    """Makes the videos of a run that has started, whose seeds are drawn."""
    inputs = conditioning.read(job)  # images and videos, before anything is loaded
    made: list[AnyPath] = []
    with (
        session.opened(job) as s,  # nothing is loaded
        output.Outputs(job, s.nets.checkpoint.digest()) as outputs,
        fitting.explained(job, outputs.kept),
    ):
        given = latents.read(s)
        s.check_agree(inputs=inputs.digest(), latents=given.digest())
        vae = functools.cache(functools.partial(s.load, "vae"))
        finished = (*given.finished, *outputs.denoised())  # the latter by a run that ended before its videos did
        for videos, whole in finished:
            made += save(s, vae, inputs, outputs, videos, whole)
        rows = outputs.unfinished([video for videos, _ in finished for video in videos])
        if rows and not given.finished:
            s, given = s.of(tuple(job.videos[row] for row in rows)), given.of(rows)
            conditions = conditioning.encode(s, inputs)  # each encoder is loaded, used and freed
            experts = LoadedExperts(s.load, job.cfg.expert_residency)  # in turn: one at a time
            s, compiled = tuning.tuned(s, conditions, inputs, given.noise, experts)
            sampler = sampling.Sampler(
                s, conditions, given.noise, outputs.states, on_segment=outputs.save_segment, compiled=compiled
            )
            s.stages.expect(**sampler.expected())
            for work in sampler.order():  # an expert's steps on a batch
                videos = sampler.videos(work)
                outputs.reserve(videos)
                with stop.deferred():  # a signal ends the run after a step
                    denoised = sampler.advance(work, experts)
                    if denoised is not None:
                        outputs.reserve(videos).save_latents(denoised)
                if work.last:
                    experts.free()  # before the VAE is loaded
                if denoised is not None:
                    made += save(s, vae, inputs, outputs, videos, denoised, sampler.logged)
    if job.cfg.cache_psnr is not None:
        output.Threshold(job).remove()
    logger.info("%s", s.stages.clock.table())
    return made


def save(
    s: session.Session,
    vae: Callable[[], WanVAE],
    inputs: conditioning.Inputs,
    outputs: output.Outputs,
    videos: tuple[Video, ...],
    denoised: Float[np.ndarray, "b f h w c"],
    logged: Mapping[Video, Mapping[int, np.ndarray]] = MappingProxyType({}),
) -> list[AnyPath]:
    """Decodes and writes files: videos after their latents, records last; `logged` is the sampler's."""
    files = outputs.reserve(videos)
    with files.explained():  # that the latents are kept
        decoder, there = vae(), files.begin(denoised)
        length, overlap = s.job.segments.frames, s.job.cfg.overlap_frames
        with files.writing(inputs.length(length, overlap), inputs.sound):  # beside the decoder
            with s.stages("decode", length, "frames") as advance:
                decode = conditioning.decoding(s, decoder, inputs, videos)
                chunks = s.job.segments.decode(decode, denoised, 0 if there is None else there.shape[1])
                decoded = frames.in_bytes(chunks, advance, sampling.instead(s.job.cfg, "vae"), there)
                for clips in inputs.results(decoded, videos, overlap):  # after the video that it extends
                    files.add(clips)
            with s.stages("encode", len(videos), "videos") as advance:  # what is left of it
                made = files.finish(advance)
    cache = output.cache_records(s.job, s.recipe, {video: logged[video] for video in videos if video in logged})
    files.record(versions(), s.stages.clock.as_dict(), inputs.record(), cache)
    outputs.finish(files)
    return made
