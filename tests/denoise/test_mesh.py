"""Eight virtual devices give the noise and the latents of one, bit for bit and to rounding."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    from maxdiffusion import parallel
    from maxdiffusion.denoise.experts import ExpertSteps
    from maxdiffusion.denoise.guidance import BatchedGuidance
    from maxdiffusion.denoise.loop import Denoiser
    from maxdiffusion.denoise.network import Network
    from maxdiffusion.denoise.noise import noise, step_keys
    from maxdiffusion.denoise.solvers import SOLVERS
    from maxdiffusion.models.dit.context import Contexts

    def velocity(params, x, timestep, context):
        shift = jnp.sin(timestep / 200)[:, None] + context.mean(1)
        return x - jnp.tanh(x @ params + shift[:, None, None, None, :])

    mesh = jax.make_mesh((2, 1, 2, 2, 1), parallel.axes.MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    placement = parallel.Placement(mesh, {"batch": ("data",), "sequence": parallel.axes.CONTEXT})
    params = jax.random.normal(jax.random.key(1), (4, 4))
    contexts = Contexts(*jax.random.normal(jax.random.key(2), (2, 2, 3, 4)))
    seeds, shape = [11, 2**40 + 3], (2, 4, 4, 4)
    x = noise(seeds, shape)
    keys = step_keys(seeds)
    experts = (ExpertSteps(0, 4, guidance_scale=3.0),)
    solvers = [SOLVERS[name] for name in ("unipc", "renoise")]
    args = [(Network.of(velocity), experts, each.schedule(4, 3.0), each, BatchedGuidance()) for each in solvers]
    denoisers = [[Denoiser(*each, scan=scan) for scan in (False, True)] for each in args]
    expected = [step_by_step.run(params, x, contexts, keys=keys) for step_by_step, _ in denoisers]
    with parallel.use(placement):
        sharded = noise(seeds, shape)
        assert sharded.sharding.is_equivalent_to(placement.sharding("batch"), 5), sharded.sharding
        np.testing.assert_array_equal(sharded, x)
        contexts = jax.device_put(contexts, placement.sharding("batch"))
        for denoiser, alone in (
            (each, alone) for pair, alone in zip(denoisers, expected, strict=True) for each in pair
        ):
            latents = denoiser.run(params, sharded, contexts, keys=keys)
            assert latents.sharding.is_equivalent_to(placement.sharding("batch"), 5), latents.sharding
            np.testing.assert_allclose(latents, alone, rtol=1e-5, atol=1e-5)


def test_eight_devices_equal_one():
    """In a process of its own: the number of virtual devices is fixed when jax starts."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    main()
