"""The VAE's programs for a TPU that is not there."""

from tests.support.tpu_compiler import needs_libtpu, run

pytestmark = needs_libtpu

LOWERED = """
import sys
import jax, jax.numpy as jnp
from maxdiffusion import parallel
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.models.vae.config import WAN21
from maxdiffusion.models.vae.model import WanVAE
mesh = parallel.make_mesh(parallel.Degrees(), devices=slice_of(sys.argv[1]).describe()[:1])
with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
    latents = parallel.like((1, 3, 90, 160, 16), jnp.float32)
    vae = WanVAE(WAN21)
    for index in range(len(vae.calls("decode", latents.shape))):
        frames, cache = vae.lower("decode", latents, index).out_info
        print(frames.dtype, *{leaf.dtype.name for leaf in jax.tree.leaves(cache)})
"""


def test_its_cache_has_the_dtype_of_the_products():
    """Of both programs, so that the second takes what the first gives; the frames are fp32, as everywhere."""
    assert run("v6e:2x4", LOWERED).splitlines() == ["float32 bfloat16"] * 2
