"""`verify=true`: the same few denoise steps on two meshes, compared number by number."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from maxdiffusion import conditioning, parallel
from maxdiffusion.conditioning import latents
from maxdiffusion.config import schema
from maxdiffusion.config.schema import Config
from maxdiffusion.denoise.experts import LoadedExperts
from maxdiffusion.errors import UserError
from maxdiffusion.request import Job, fitting, on_mesh, seeds, session
from maxdiffusion.runtime import distributed
from maxdiffusion.sampling import Sampler

# PSNR that two meshes must reach, by the dtype of activations. Measured with the bundled model on 8 virtual devices
# (`pytest -m "slow or not slow" tests/e2e/test_verify.py -s`): at least 135 dB in float32, 51 in bfloat16.
TOLERANCES = {"float32": 60.0, "bfloat16": 30.0}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of the latents after a step; the largest value of b scales `relative` and is the peak of `psnr`."""

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


def run(job: Job) -> list[Difference]:
    """Denoises `verify_steps` steps of the first batch twice, prints the difference per step and returns them.

    Once on the mesh of the config and once on that of `verify_against` (by default one device), with the same noise.

    Raises:
      UserError: the two differ by more than the tolerance, or are not numbers at all.
    """
    session.start(job)
    job = seeds.drawn(job)
    cfg = job.cfg.model_copy(update=_few_steps(job.cfg) | {"loop": "steps"})
    job = dataclasses.replace(job, cfg=cfg)
    if not cfg.verify_against and distributed.count() > 1:
        raise UserError(
            f"verify=true compares with one device, which only one of {distributed.count()} hosts has; name a second "
            "mesh of all devices, such as verify_against='[attention=ring, ulysses_shards=1]'."
        )
    if not cfg.verify_against and len(distributed.devices()) == 1:
        raise UserError(
            "verify=true compares with one device, and there is one here; make more (on a CPU, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8), or compare kernels, "
            "verify_against='[attention=dot_product]'."
        )
    other = on_mesh(job, cfg.verify_against) if cfg.verify_against else _on_one_device(job)
    ours = _latents(job, None)
    theirs = _latents(other, None if cfg.verify_against else jax.devices()[:1])

    exact = cfg.quantization == cfg.attention_quantization == "none"  # 8 bits are no more exact than bfloat16
    dtype = cfg.activations_dtype if exact else "bfloat16"
    tolerance = TOLERANCES[dtype] if cfg.verify_psnr is None else cfg.verify_psnr
    found = [Difference.between(a, b) for a, b in zip(ours, theirs, strict=True)]
    if distributed.index() == 0:
        print(f"against {' '.join(cfg.verify_against) or 'one device'}; at least {tolerance:g} dB are required")
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


def _few_steps(cfg: Config) -> dict[str, Any]:
    """The keys of a run of `verify_steps` steps: of explicit levels the first, of two experts' own steps half each."""
    steps = cfg.verify_steps
    if cfg.sigmas:
        return {"sigmas": cfg.sigmas[:steps], "num_inference_steps": len(cfg.sigmas[:steps])}
    if cfg.num_inference_steps_2 and steps > 1:
        return {"num_inference_steps": -(-steps // 2), "num_inference_steps_2": steps // 2}
    return {"num_inference_steps": steps, "num_inference_steps_2": None}


def _on_one_device(job: Job) -> Job:
    """The same run with the keys of mesh and kernel reset for one device."""
    keys = set(schema.group(schema.PARALLELISM)) - {"per_device_batch_size", "logical_axis_rules"}
    update = {key: 1 if key.endswith("_parallelism") else schema.default(key) for key in keys}
    return dataclasses.replace(job, cfg=job.cfg.model_copy(update=update))


def _latents(job: Job, devices: parallel.Devices | None) -> list[np.ndarray]:
    """The first batch's latents after every step."""
    seen: list[np.ndarray] = []
    inputs = conditioning.read(job)
    with session.opened(job, devices) as s, fitting.explained(job):
        given = latents.read(s)
        s.check_agree(inputs=inputs.digest(), latents=given.digest())
        conditions = conditioning.encode(s, inputs)
        experts = LoadedExperts(s.load, job.cfg.expert_residency)
        sampler = Sampler(s, conditions, given.noise, None, lambda i, x: seen.append(distributed.fetch(x).copy()))
        for work in sampler.order():
            if work.batch == 0 and sampler.advance(work, experts) is not None:
                break
    return seen
