"""Resources of a run: hosts, log, compile cache, checkpoint, mesh, attention plan and clock."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.config import schema
from maxdiffusion.denoise.caches import Cache
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.hardware import quantization
from maxdiffusion.request import caching, checks, few_step, fitting, half_size, layout, loras, nets
from maxdiffusion.request.job import Job
from maxdiffusion.request.videos import Video
from maxdiffusion.runtime import compile_cache, distributed, log
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.runtime.versions import versions
from maxdiffusion.weights.loader import placed
from maxdiffusion.weights.nets import Build, Nets

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A run on its devices, before anything is read: enough to compile all its programs.

    Attributes:
      job: the run.
      recipe: the denoise loop's strategies.
      configs: of the networks, by folder.
      plan: how attention is split and computed.
      placement: the mesh and its logical axes.
    """

    job: Job
    recipe: Recipe
    configs: Mapping[str, Any]
    plan: AttentionPlan
    placement: parallel.Placement

    @classmethod
    def of(cls, job: Job, configs: Mapping[str, Any], devices: parallel.Devices | None = None) -> Setup:
        """The setup on these devices (all by default; may be abstract).

        Raises:
          UserError: the devices do not fit the degrees, or the schedule has no steps.
        """
        recipe = recipe_of(job)
        return cls(job, recipe, configs, *layout.lay_out(job, recipe, configs, devices))

    @functools.cached_property
    def builders(self) -> Mapping[str, Build]:
        """How each network is built."""
        return nets.builders(self.job.cfg, self.plan, self.device_kind)

    @property
    def device_kind(self) -> str:
        """Of the devices, as jax calls it."""
        return self.placement.mesh.devices.flat[0].device_kind

    @functools.cached_property
    def cache(self) -> Cache:
        """The step cache."""
        return caching.strategy(self.job, self.recipe)

    def abstract(self, net: str) -> nnx.Module:
        """One network with abstract parameters: shapes, shardings."""
        if net not in self._abstract:
            self._abstract[net] = placed(self.builders[net](self.configs[net]), self.placement)
        return self._abstract[net]

    @functools.cached_property
    def _abstract(self) -> dict[str, nnx.Module]:
        return {}


@dataclasses.dataclass(frozen=True)
class Session:
    """A run whose checkpoint is open.

    Attributes:
      setup: the run on its devices.
      nets: the checkpoint, matched with its networks.
      stages: clock and progress.
    """

    setup: Setup
    nets: Nets
    stages: Stages

    @property
    def job(self) -> Job:
        return self.setup.job

    @property
    def recipe(self) -> Recipe:
        return self.setup.recipe

    @property
    def configs(self) -> Mapping[str, Any]:
        return self.setup.configs

    def of(self, videos: tuple[Video, ...]) -> Session:
        """The session for some of its videos."""
        job = dataclasses.replace(self.job, videos=videos)
        return dataclasses.replace(self, setup=dataclasses.replace(self.setup, job=job))

    def load(self, net: str) -> Any:
        """One network, streamed to its devices."""
        with self.stages("load", self.nets.nbytes_on_disk(net), "bytes", net) as advance:
            loaded = self.nets.load(net, advance)
        distributed.wait_for_all()  # a disk may be slower than others
        return loaded

    def check_agree(self, **digests: str) -> None:
        """Checks that all processes have the same run, checkpoint, versions and inputs (`digests`).

        Raises:
          UserError: they differ; it names the first keys in which they do.
        """
        settings = self.job.cfg.to_json()
        facts = {key: settings[key] for key, about in schema.KEYS.items() if not about.per_host}
        facts |= {f"version of {key}": value for key, value in versions().items()}
        facts["cache"] = repr(self.setup.cache)
        shown = [(video.prompt, video.negative_prompt, video.seed, video.shape) for video in self.job.videos]
        nets = {f"content of {name}": found[:12] for name, found in self.nets.checkpoint.digests.items()}
        distributed.check_agree(facts | {"videos": repr(shown)} | nets | digests)


def recipe_of(job: Job) -> Recipe:
    """The strategies that the config names.

    Raises:
      UserError: the schedule cannot be made, or `strength` or `low_resolution_steps` leaves none of its steps.
    """
    cfg = job.cfg
    recipe = Recipe.of(
        cfg.solver,
        (cfg.num_inference_steps, cfg.num_inference_steps_2),
        (cfg.flow_shift, cfg.flow_shift_2),
        scales=(cfg.guidance_scale, cfg.guidance_scale_2),
        boundary=cfg.boundary_ratio,
        boundary_step=cfg.boundary_step,
        sigmas=cfg.sigmas,
        strength=cfg.strength if cfg.video and "strength" in job.spec.task.takes else None,
        levels=job.conventions.levels,
    )
    return half_size.applied(job, recipe)


def start(job: Job) -> None:
    """Joins the processes of the run, sets up log and compile cache, and logs the config.

    Raises:
      UserError: the processes do not meet, or a folder cannot be written.
    """
    cfg = job.cfg
    log.setup(cfg.log_level)
    distributed.start(job.hosts)
    if distributed.index() and cfg.log_level != "error":
        log.setup("warning")
    logger.info("%s", cfg.describe())
    if job.windows is not None:
        logger.info("context windows: %s", job.windows)
    if words := caching.described(job, recipe_of(job)):
        logger.info("%s", words)
    if steps := recipe_of(job).half_steps:
        logger.info("low_resolution_steps=%s: %d steps are at half height and width", cfg.low_resolution_steps, steps)
    for warning in few_step.warnings(job, recipe_of(job)):
        logger.warning("%s", warning)
    with distributed.fail_together():
        compile_cache.enable(cfg.jax_cache_dir)
        if distributed.count() > 1 and distributed.index() == 0:
            checks.check_output(job)


@contextlib.contextmanager
def opened(job: Job, devices: parallel.Devices | None = None) -> Iterator[Session]:
    """Opens the checkpoint and lays the run out on its devices (all by default); loads nothing.

    Raises:
      UserError: the checkpoint is not what the config says, or the devices do not fit its degrees; on any host.
    """
    stages = Stages(job.cfg.progress)
    with distributed.fail_together(), stages("load", what="checkpoint"):
        checkpoint = loras.merged(job, nets.open_checkpoint(job))
        setup = Setup.of(job, checkpoint.configs, devices)
        if (chosen := quantization.choose(job.cfg.quantization, setup.device_kind)) is not None:
            logger.info("quantization=%s: %s (%s)", job.cfg.quantization, chosen, setup.device_kind)
        if setup.plan.quantization != "none":
            logger.info("%s", quantization.of_attention(setup.plan.kernel, setup.device_kind))
        loras.report(checkpoint, job.cfg.weights_dtype if chosen is None else chosen.dtype)
        session = Session(setup, Nets(checkpoint, setup.builders, setup.placement), stages)
        if distributed.index() == 0:
            fitting.warn(job, setup.recipe, setup.configs, setup.plan, setup.placement.mesh)
    with parallel.use(setup.placement), stages.clock.compilation():
        yield session
