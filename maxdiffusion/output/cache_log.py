"""What a step cache has logged of a run: in the records of the videos, or in the file of `calibrate_cache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.errors import UserError
from maxdiffusion.request import Job, Video
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import write_json

# By video and segment.
Logged = Mapping[Video, Mapping[int, Float[np.ndarray, "branches steps"]]]


def cache_records(job: Job, recipe: Recipe, logged: Logged) -> dict[Video, dict[str, Any]]:
    """What the record of each video tells of the step cache; with `calibrate_cache`, writes that file instead.

    Raises:
      UserError: a calibration went on from the state of a run without it.
    """
    if not job.cfg.calibrate_cache:
        return {video: record(job, logs) for video, logs in logged.items() if logs}
    path = paths.parse(job.cfg.calibrate_cache)
    if ratios := [calibration(job, recipe, logs) for logs in logged.values()]:
        distributed.on_process_0(lambda: write_json(path, ratios[0], job.cfg.overwrite))
    return {}


def record(job: Job, logged: Mapping[int, Float[np.ndarray, "branches steps"]]) -> dict[str, Any]:
    """The steps of each segment, from 1, that a video has computed, of the prompt and of the negative prompt.

    With `cache_psnr`, the threshold that was found, too; null where every step is computed.

    Of a run that went on from a state without a log, steps before that are not known and not listed.
    """
    branches = ("prompt", "negative_prompt")
    found, threshold = {}, job.cfg.cache_threshold
    if job.cfg.cache_psnr is not None:
        found["threshold"] = None if threshold is None or threshold < 0 else threshold
    return {
        "name": job.cfg.cache,
        **found,
        "computed": [
            {name: [int(step) + 1 for step in np.flatnonzero(row)] for name, row in zip(branches, log, strict=False)}
            for _, log in sorted(logged.items())
        ],
    }


def calibration(job: Job, recipe: Recipe, logged: Mapping[int, Float[np.ndarray, "branches steps"]]) -> dict[str, Any]:
    """The content of `calibrate_cache`: the mean ratios over segments of the prompt's branch, and what they are of.

    Raises:
      UserError: some steps were made by a run without calibration.
    """
    ratios = np.array([log[0] for log in logged.values()])
    if not logged or not ratios.all():
        raise UserError(
            "calibrate_cache needs the ratios of all steps, and this run went on from a state that has none; run it "
            "again with checkpoint_steps=0."
        )
    about = {"model_name": job.spec.name, "solver": job.cfg.solver, "flow_shift": job.cfg.flow_shift}
    about |= {"experts": [list(each) for each in recipe.experts]}
    return about | {"ratios": [round(float(each), 5) for each in ratios.mean(axis=0)]}
