"""The VAE over the width of the picture: the numbers of one device, halos instead of whole frames, less memory each."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.models.vae import conv, model
from maxdiffusion.models.vae.blocks import place
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.vae.model import WanVAE
from tests.support.parity import relative_error

CONFIG = VAEConfig(latents_mean=(0.1,) * 4, latents_std=(0.9,) * 4, base_dim=8, z_dim=4, num_res_blocks=1)
GATHER = re.compile(r" = \(?\w+\[([\d,]+)\].*? (?:all-gather|all-to-all|all-reduce)(?:-start)?\(")


def program(name, x, devices):
    """Two latent frames in one program, the VAE's parameters drawn anew (the same ones): the result, the program."""
    mesh = parallel.make_mesh(parallel.Degrees(context=devices), devices=jax.devices()[:devices])
    graph, params = nnx.split(WanVAE(CONFIG))
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        return parallel.put(np.float32(leaf.ndim == 1) + scale * rng.standard_normal(leaf.shape, np.float32))

    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        x, params = parallel.put(x), jax.tree.map(draw, params)
        compiled = model.program().lower(graph, params, name, None, x).compile()
        return compiled(params, None, x)[0], compiled


@pytest.mark.parametrize("width", [16, 13, 3])
def test_a_tpus_convolution_over_any_width_passes_single_columns(width):
    """13 columns over 8 devices: six hold two, one holds one and one none; 3 columns: five hold none."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((1, 3, 4, width, 8), np.float32)
    kernel = rng.standard_normal((3, 3, 3, 8, 8), np.float32)
    want = jax.jit(conv._conv3d_tpu)(x, kernel)
    mesh = parallel.make_mesh(parallel.Degrees(context=8), devices=jax.devices()[:8])
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        split = jax.jit(lambda x, kernel: place(conv._conv3d_tpu(place(x), kernel))).lower(x, kernel).compile()
    assert relative_error(split(x, kernel), want) < 1e-6
    assert "collective-permute" in split.as_text()
    if width % 8 == 0:  # else the result, which no program can return in parts, is gathered
        assert not GATHER.search(split.as_text())


def given(name, width):
    shape = (1, 2, 3, width, 4) if name == "decode" else (1, 5, 24, 8 * width, 3)
    return np.random.default_rng(width).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "width", "devices"),
    [
        ("decode", 12, 8),
        *(
            pytest.param(name, width, devices, marks=pytest.mark.slow)
            for name in ("decode", "encode")
            for width, devices in ((16, 2), (16, 4), (16, 8), (12, 8), (13, 4))
            if (name, width) != ("decode", 12)
        ),
    ],
)
def test_the_numbers_are_those_of_one_device_in_less_memory_and_no_frame_is_gathered(name, width, devices):
    """12 columns of latents over 8 devices: six hold two and two none, until the picture is wide enough for all."""
    x = given(name, width)
    want, alone = program(name, x, 1)
    got, split = program(name, x, devices)
    assert relative_error(got, want) < 1e-5
    # What is gathered is what every row of the attention in the middle needs: keys and values, of the latents' size.
    latent_pixels = 2 * 3 * (-(-width // devices) * devices)
    gathered = [math.prod(map(int, shape.split(","))) for shape in GATHER.findall(split.as_text())]
    if 2 * width % devices == 0:  # else doubling such a picture gathers it, at a quarter of the size or less
        assert max(gathered) <= latent_pixels * CONFIG.base_dim * CONFIG.dim_mult[-1]
    memory = [compiled.memory_analysis().temp_size_in_bytes for compiled in (alone, split)]
    print(f"{name}, {width} columns over {devices}: {memory[1] / memory[0]:.2f} of the temporary memory")
    assert memory[1] < 0.7 * memory[0]  # over 8 devices 0.33 to 0.55: of so small a net, what is not split is much
