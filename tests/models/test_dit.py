"""The transformer against `diffusers.WanTransformer3DModel` on the same random weights."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context, PreparedContext
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights.tables import dit as table
from tests.support.parity import load_state_dict, relative_error

TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 6,
    "out_channels": 5,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
}
SIZE = (3, 6, 4)  # latent f h w: 3 x 3 x 2 tokens
BATCH, TEXT = 2, 7


def ours_of(reference, *, dtype=jnp.float32, scan_layers=True):
    config = DiTConfig.from_json(dict(reference.config))
    model = WanTransformer(config, AttentionPlan(), Dtypes(dtype, dtype), scan_layers=scan_layers)
    return load_state_dict(model, table.RULES, reference.state_dict())


@functools.cache
def reference_model():
    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY).eval()
    with torch.no_grad():  # norms and biases away from the one and zero they are born with
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def inputs():
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((BATCH, *SIZE, TINY["in_channels"]), dtype=np.float32)
    timestep = np.array([999.0, 37.5], np.float32)
    context = rng.standard_normal((BATCH, TEXT, TINY["text_dim"]), dtype=np.float32)
    context[0, 4:] = 0  # the zeros after a prompt's length are tokens like others
    return latents, timestep, context


def run_reference(model, latents, timestep, context):
    with torch.no_grad():
        out = model(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timestep),
            torch.from_numpy(context),
            return_dict=False,
        )[0]
    return out.float().permute(0, 2, 3, 4, 1).numpy()


@functools.cache
def expected():
    return run_reference(reference_model(), *inputs())


@nnx.jit
def run(model, latents, timestep, context):
    return model(latents, timestep, context if isinstance(context, PreparedContext) else Context(context))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_matches_the_reference(scan_layers):
    model = ours_of(reference_model(), scan_layers=scan_layers)
    velocity = run(model, *map(jnp.asarray, inputs()))
    assert velocity.dtype == jnp.float32
    assert relative_error(velocity, expected()) < 1e-5


def test_prepared_context_gives_the_same_numbers_and_concatenates_on_the_batch():
    model = ours_of(reference_model())
    latents, timestep, context = map(jnp.asarray, inputs())
    prepare = nnx.jit(WanTransformer.prepare)
    halves = [prepare(model, Context(context[i : i + 1])) for i in range(BATCH)]
    prepared = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    assert isinstance(prepared, PreparedContext)
    assert relative_error(run(model, latents, timestep, prepared), expected()) < 1e-5


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from flax import nnx
from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.parallel.mesh import Degrees, make_mesh
from maxdiffusion.parallel.rules import rules_for
from tests.support.parity import drawn

latents, timestep, context = (jnp.asarray(np.load(sys.argv[1])[name]) for name in ("latents", "timestep", "context"))
config = DiTConfig.from_json({TINY})
alone, shared = (
    drawn(WanTransformer(config, plan, Dtypes()))
    for plan in (AttentionPlan(), AttentionPlan("ulysses_ring", "dot_product", ring=2, ulysses=2))
)
run = nnx.jit(WanTransformer.__call__)
expected = run(alone, latents, timestep, Context(context))
with parallel.use(parallel.Placement(make_mesh(Degrees(data=2, context=4), ulysses=2), rules_for())):
    velocity = run(shared, latents, timestep, Context(context))
print(float(jnp.abs(velocity - expected).max() / jnp.abs(expected).max()))
"""


def test_a_mesh_over_which_the_tokens_do_not_divide_changes_nothing(tmp_path):
    """18 tokens on ring 2 x ulysses 2, batch on 2: the transformer pads them to 20, in a process of 8 CPU devices."""
    assert math.prod(SIZE) // 4 % 4
    np.savez(tmp_path / "inputs.npz", **dict(zip(("latents", "timestep", "context"), inputs(), strict=True)))
    program = SHARDED.replace("{TINY}", repr(TINY))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "inputs.npz")],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 2e-6


def test_bf16_is_as_close_to_fp32_as_the_reference_in_bf16(tmp_path):
    """Bound in bf16: 2 % of the largest value, and no farther from fp32 than 1.25 times the reference's own bf16."""
    reference_model().save_pretrained(tmp_path)
    reference = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    latents, timestep, context = inputs()
    with torch.no_grad():
        theirs = reference(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3).bfloat16(),
            torch.from_numpy(timestep),
            torch.from_numpy(context).bfloat16(),
            return_dict=False,
        )[0]
    theirs = relative_error(theirs.float().permute(0, 2, 3, 4, 1).numpy(), expected())
    model = ours_of(reference_model(), dtype=jnp.bfloat16)
    velocity = run(model, *map(jnp.asarray, inputs()))
    assert velocity.dtype == jnp.float32
    ours = relative_error(velocity, expected())
    assert ours < 0.02
    assert ours < 1.25 * theirs


def test_what_stays_fp32_under_bf16_weights():
    config = DiTConfig.from_json(TINY)
    model = WanTransformer(config, AttentionPlan(), Dtypes(jnp.bfloat16, jnp.bfloat16))
    kept = {"norm_q", "norm_k", "norm2", "scale_shift_table", "condition_embedder"}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert leaf.dtype == (jnp.float32 if kept & set(path) else jnp.bfloat16), path


@pytest.mark.slow
def test_a_block_at_14b_width_matches_the_reference():
    torch.manual_seed(0)
    reference = WanTransformer3DModel(num_layers=1).eval()
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, 2, 8, 8, 16), dtype=np.float32)
    timestep = np.array([500.0], np.float32)
    context = rng.standard_normal((1, 16, 4096), dtype=np.float32)
    theirs = run_reference(reference, latents, timestep, context)
    model = ours_of(reference)
    assert relative_error(run(model, jnp.asarray(latents), jnp.asarray(timestep), jnp.asarray(context)), theirs) < 1e-4
