"""`verify=true`: the same few denoise steps on two meshes, compared number by number."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float

from maxdiffusion import conditioning, parallel
from maxdiffusion.config import Config
from maxdiffusion.config.examples import examples
from maxdiffusion.config.load import replaced
from maxdiffusion.denoise import given, sampling
from maxdiffusion.errors import UserError
from maxdiffusion.generate_wan import open_nets
from maxdiffusion.runtime import compile_cache, distributed, log
from maxdiffusion.runtime.stages import Stages

logger = logging.getLogger(__name__)

# PSNR that two meshes must reach, by the dtype of activations. Measured with the bundled model on 8 virtual devices
# (`pytest -m "slow or not slow" tests/e2e/test_verify.py -s`): at least 135 dB in float32, 51 in bfloat16.
TOLERANCES = {"float32": 60.0, "bfloat16": 30.0}

ONE_DEVICE = (
    "attention=auto",
    "ulysses_shards=auto",
    "ulysses_attention_chunks=1",
    "ring_direction=one_way",
    "flash_block_sizes=",
    "use_base2_exp=",
    "use_experimental_scheduler=",
    "attention_vmem_limit_kib=",
    *(f"{level}_{axis}_parallelism=1" for level in ("ici", "dcn") for axis in ("data", "fsdp", "context", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the latents are apart after a step; relative to, and the peak of the PSNR is, the largest value of b."""

    largest: float
    relative: float
    psnr: float

    @classmethod
    def between(cls, a: Float[np.ndarray, " ..."], b: Float[np.ndarray, " ..."]) -> Difference:
        peak = float(np.abs(b).max())
        distance = np.abs(a.astype(np.float64) - b)
        rms = float(np.sqrt(np.mean(distance**2)))
        psnr = float("inf") if rms == 0 else float(20 * np.log10(peak / rms))
        return cls(float(distance.max()), float(distance.max()) / peak, psnr)


def run(cfg: Config) -> list[Difference]:
    """Denoises `verify_steps` steps of the first batch twice, prints the difference per step and returns them.

    Once on the mesh of `cfg` and once on that of `verify_against` (nothing given: on one device), with the same noise.

    Raises:
      UserError: the two differ by more than the tolerance, or are no numbers at all.
    """
    log.setup(cfg.log_level)
    distributed.start(cfg)
    logger.info("%s", cfg.describe())
    compile_cache.enable(cfg.jax_cache_dir)
    cfg = cfg.model_copy(update={"num_inference_steps": cfg.verify_steps, "loop": "steps"})
    if not cfg.verify_against and jax.process_count() > 1:
        raise UserError(
            f"verify=true compares with one device, which only one of {jax.process_count()} hosts has; name a second "
            "mesh of all devices, such as verify_against='[attention=ring, ulysses_shards=1]'."
        )
    other = replaced(cfg, cfg.verify_against or ONE_DEVICE)
    ours = list(_latents(cfg, None))
    theirs = list(_latents(other, None if cfg.verify_against else jax.devices()[:1]))

    tolerance = TOLERANCES[cfg.activations_dtype] if cfg.verify_psnr is None else cfg.verify_psnr
    found = [Difference.between(a, b) for a, b in zip(ours, theirs, strict=True)]
    if distributed.index() == 0:
        print(f"against {' '.join(cfg.verify_against) or 'one device'}; at least {tolerance:g} dB are asked for")
        print(f"{'step':>4} {'max error':>12} {'relative':>12} {'PSNR dB':>8}")
        for step, difference in enumerate(found, 1):
            print(f"{step:>4} {difference.largest:>12.3e} {difference.relative:>12.3e} {difference.psnr:>8.1f}")
    bad = [step for step, difference in enumerate(found, 1) if not difference.psnr >= tolerance]  # NaN is bad
    if bad:
        raise UserError(
            f"The two meshes differ by more than {tolerance:g} dB allow from step {bad[0]} on; if that is rounding "
            "(bfloat16), try activations_dtype=float32 weights_dtype=float32, or set verify_psnr."
        )
    return found


def _latents(cfg: Config, devices: parallel.Devices | None) -> Iterator[np.ndarray]:
    """The first batch's latents after every step."""
    stages, videos = Stages(cfg.progress), examples(cfg)
    with distributed.together():
        inputs = conditioning.read(cfg, videos)
        nets, placement, shape = open_nets(cfg, stages, devices)
        start = given.read(cfg, shape)
    distributed.agree(cfg, checkpoint=nets.files.digest(), latents=start.digest(), inputs=inputs.digest())
    seen: list[np.ndarray] = []
    with parallel.use(placement), stages.clock.compilation():
        batches = sampling.sample(
            cfg, videos, nets, shape, start.noise, inputs, stages, lambda i, x: seen.append(distributed.fetch(x).copy())
        )
        next(iter(batches))
    yield from seen
