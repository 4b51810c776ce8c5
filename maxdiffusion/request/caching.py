"""The step cache of a run: its keys, checked, as a strategy of the denoise loop."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from maxdiffusion.config import schema
from maxdiffusion.config.schema import Config
from maxdiffusion.denoise import cache_schedules as schedules
from maxdiffusion.errors import UserError
from maxdiffusion.request.job import Job
from maxdiffusion.runtime import paths

if TYPE_CHECKING:
    from maxdiffusion.denoise.caches import Cache
    from maxdiffusion.denoise.recipe import Recipe

FEWEST = 10  # steps of a run that repeats itself; few-step models have 3 to 9

# Keys that each cache uses beside cache_first_steps.
_KEYS = {
    "mag": ("cache_threshold", "cache_psnr", "cache_max_skips", "cache_ratios"),
    "sea": ("cache_threshold", "cache_psnr", "cache_max_skips"),
    "first_block": ("cache_threshold", "cache_psnr"),
    "taylor": ("cache_max_skips",),
    "spectrum": ("cache_max_skips",),
}
# Arrays of the size of the tokens in the state of a call.
_KEPT = {"mag": 1, "sea": 2, "first_block": 2, "spectrum": 5}
_THRESHOLDS = {"sea": 0.25, "first_block": 0.05}  # of diffusers, as are max_skips and first steps
_MAX_SKIPS = {"sea": 2, "taylor": 4}
_FIRST = {"sea": 1, "first_block": 1, "taylor": 3, "spectrum": 5}


def check(job: Job) -> None:
    """Checks the keys of a run with a cache or its calibration.

    Raises:
      UserError: they make no sense beside one another or for this model.
    """
    cfg = job.cfg
    if cfg.cache == "none":
        _check_steps(cfg, "calibrate_cache")
        if paths.probe(cfg.calibrate_cache or "").is_file() and not cfg.overwrite:
            raise UserError(f"{cfg.calibrate_cache} exists already; name another file, or write overwrite=true.")
        return
    if cfg.calibrate_cache:
        raise UserError(f"calibrate_cache computes every step, and cache={cfg.cache} does not; leave one of them out.")
    for key in ("cache_threshold", "cache_psnr", "cache_max_skips", "cache_ratios"):
        if key not in _KEYS[cfg.cache] and not schema.is_default(cfg, key):
            able = " or ".join(name for name, keys in _KEYS.items() if key in keys)
            raise UserError(f"{key} is not used by cache={cfg.cache}, but by {able}; leave it out.")
    _check_steps(cfg, f"cache={cfg.cache}")
    if cfg.cache_psnr is not None:
        _check_psnr(cfg)
    if cfg.cache == "mag":
        published(job)


def few_steps(cfg: Config) -> str | None:
    """What makes a schedule a few-step one; None where it is not."""
    steps = cfg.num_inference_steps + (cfg.num_inference_steps_2 or 0)
    if steps < FEWEST:
        return f"{steps} steps"
    return "solver=renoise" if cfg.solver == "renoise" else None


def _check_steps(cfg: Config, key: str) -> None:
    if what := few_steps(cfg):
        raise UserError(
            f"{key} is for schedules whose steps resemble one another, but {what} is a few-step schedule, of which "
            f"none can be left out; leave it out, or use at least {FEWEST} steps of a model that is not distilled."
        )


def _check_psnr(cfg: Config) -> None:
    if cfg.cache_threshold is not None:
        raise UserError(
            f"cache_psnr finds the threshold that cache_threshold={cfg.cache_threshold:g} gives; leave one of them out."
        )
    if cfg.verify:
        raise UserError("cache_psnr is not used by verify=true, which makes few steps; give a cache_threshold.")
    if cfg.loop == "scan":
        raise UserError("cache_psnr looks at the latents of single steps; leave loop=scan out, or give a threshold.")


def published(job: Job) -> schedules.Published:
    """MagCache's ratios and settings: of `cache_ratios`, or those published of the variant.

    Raises:
      UserError: there are none, or the file cannot be read.
    """
    cfg = job.cfg
    if cfg.cache_ratios:
        return schedules.Published(_read(cfg.cache_ratios), *schedules.CALIBRATED)
    kind = job.spec.name, any(video.image for video in job.videos)
    if kind not in schedules.PUBLISHED:
        raise UserError(
            f"cache=mag has no published ratios of {job.spec.name}{' with an image' if kind[1] else ''}; measure them "
            "once with calibrate_cache=FILE and give cache_ratios=FILE, or choose cache=sea, which needs none."
        )
    return schedules.PUBLISHED[kind]


def _read(path: str) -> tuple[float, ...]:
    try:
        ratios = json.loads(paths.parse(path).read_text())["ratios"]
        if not ratios or not all(isinstance(each, int | float) and each > 0 for each in ratios):
            raise ValueError("ratios must be positive numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cache_ratios={path} cannot be read as a file of calibrate_cache ({error}); write one by a run with "
            "calibrate_cache=FILE."
        ) from None
    return tuple(map(float, ratios))


def kept(cfg: Config) -> int:
    """How many arrays of the size of the tokens a call of the network keeps from step to step."""
    return 1 if cfg.calibrate_cache else _KEPT.get(cfg.cache, 0)


def is_static(cfg: Config) -> bool:
    """Whether the computed steps are known before the run."""
    return cfg.cache in ("mag", "taylor", "spectrum") and cfg.cache_psnr is None


def threshold(job: Job) -> float:
    """`cache_threshold`, by default that of the cache; 0 where it uses none."""
    if job.cfg.cache_threshold is not None:
        return job.cfg.cache_threshold
    return published(job).threshold if job.cfg.cache == "mag" else _THRESHOLDS.get(job.cfg.cache, 0.0)


def with_threshold(job: Job, threshold: float) -> Job:
    """The run with that `cache_threshold`; a negative one computes every step."""
    return dataclasses.replace(job, cfg=job.cfg.model_copy(update={"cache_threshold": threshold}))


def computed(job: Job, recipe: Recipe) -> tuple[bool, ...]:
    """Whether each step is computed; of caches that decide in the run, whether it is computed in any case."""
    cfg, experts = job.cfg, recipe.experts
    lengths = [each.stop - each.start for each in experts]
    max_skips, given = cfg.cache_max_skips, cfg.cache_first_steps
    match cfg.cache:
        case "none":
            return (True,) * len(recipe.schedule)
        case "taylor":
            first = _FIRST["taylor"] if given is None else given
            return schedules.taylor(experts, first, _MAX_SKIPS["taylor"] if max_skips is None else max_skips)
        case "spectrum":
            return schedules.spectrum(experts, _FIRST["spectrum"] if given is None else given, max_skips)
        case "mag":
            table = published(job)
            counts = [int(table.first * length + 0.5) if given is None else given for length in lengths]
            if table.whole_first and len(experts) > 1 and given is None:
                counts[0] = lengths[0]
            return schedules.mag(
                schedules.first_steps(experts, counts),
                experts,
                schedules.nearest(table.ratios, len(recipe.schedule)),
                threshold(job),
                table.max_skips if max_skips is None else max_skips,
            )
    first = _FIRST[cfg.cache] if given is None else given
    must = list(schedules.first_steps(experts, [first] * len(experts)))
    must[-1] |= cfg.cache == "sea"
    return tuple(must)


def counted(job: Job, recipe: Recipe) -> list[int]:
    """How many steps of each expert are computed; of caches that decide in the run, all."""
    if not is_static(job.cfg):
        return [each.stop - each.start for each in recipe.experts]
    compute = computed(job, recipe)
    return [sum(compute[each.start : each.stop]) for each in recipe.experts]


def strategy(job: Job, recipe: Recipe) -> Cache:
    """The cache as the denoise loop calls it."""
    from maxdiffusion.denoise import caches

    cfg, compute = job.cfg, computed(job, recipe)
    if cfg.calibrate_cache:
        return caches.Calibration()
    match cfg.cache:
        case "mag":
            return caches.MagCache(compute)
        case "taylor":
            return caches.TaylorSeer(compute)
        case "spectrum":
            return caches.Spectrum(compute, tuple(each.start for each in recipe.experts))
        case "first_block":
            return caches.FirstBlock(compute, threshold(job))
        case "sea":
            max_skips = _MAX_SKIPS["sea"] if cfg.cache_max_skips is None else cfg.cache_max_skips
            return caches.SeaCache(compute, threshold(job), max_skips)
    return caches.NoCache()


def described(job: Job, recipe: Recipe) -> str:
    """The cache in words, for the log; empty without one."""
    cfg, compute = job.cfg, computed(job, recipe)
    if cfg.cache == "none":
        return ""
    if cfg.cache_psnr is not None:
        return f"cache={cfg.cache}: its threshold is found by the first steps, for cache_psnr={cfg.cache_psnr:g}"
    if not is_static(cfg):
        return f"cache={cfg.cache}: each video computes at least {sum(compute)} of {len(compute)} steps"
    steps = " ".join(str(step) for step, each in enumerate(compute, 1) if each)
    if all(compute):
        return f"cache={cfg.cache} leaves no step out here; a larger cache_threshold or more steps would"
    return f"cache={cfg.cache}: {sum(compute)} of {len(compute)} steps are computed: {steps}"
