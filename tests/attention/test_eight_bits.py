"""Queries and keys in e4m3: the same in the TPU's kernel and where they are widened, near the exact attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion import parallel
from maxdiffusion.attention.api import self_attention
from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.eight_bits import eight_bits
from maxdiffusion.attention.flash import flash
from maxdiffusion.attention.plan import AttentionPlan


@functools.cache
def case(offset=0.0, tokens=150, dim=32):
    """q, k, v and a mask; the mean of the keys is `offset` in every channel."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, tokens, 4, dim), dtype=np.float32)) for _ in range(3))
    return q, k + offset, v, jnp.arange(tokens)[None] < jnp.array([[tokens], [tokens - 37]])


def error(found, exact):
    return float(jnp.sqrt(jnp.mean((found - exact) ** 2) / jnp.mean(exact**2)))


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_and_the_widened_product_agree(masked):
    q, k, v, valid = case(3.0)
    valid = valid if masked else None
    bad = jnp.where(valid[..., None, None], k, jnp.nan) if masked else k
    out, lse = eight_bits(flash, native=True)(q, bad, v, valid)
    want, want_lse = eight_bits(dense, native=False)(q, bad, v, valid)
    assert error(out, want) < 2e-6 and jnp.abs(lse - want_lse).max() < 2e-5


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_loss_does_not_depend_on_the_mean_of_the_keys(offset):
    q, k, v, valid = case(offset)
    (out, lse), (want, want_lse) = (run(q, k, v, valid) for run in (eight_bits(dense, native=False), dense))
    assert 1e-3 < error(out, want) < 0.06
    assert 1e-4 < jnp.abs(lse - want_lse).max() < 0.06


@pytest.mark.parametrize(("kernel", "ring", "ulysses"), [("chunked", 4, 1), ("flash", 2, 2)])
def test_on_a_mesh(kernel, ring, ulysses):
    """Each hop centres its own keys: log-sum-exps of different means are merged."""
    q, k, v, valid = case(3.0, tokens=61)
    k = k.at[:, 30:].add(5.0)
    plan = AttentionPlan("ulysses_ring", kernel, ring, ulysses, 4, quantization="fp8")
    degrees = parallel.Degrees(context=ring * ulysses)
    mesh = parallel.make_mesh(degrees, ulysses=ulysses, devices=jax.devices()[: ring * ulysses])
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        out = jax.jit(lambda *a: self_attention(plan, *a))(q, k, v, valid)
    assert 1e-3 < error(out, dense(q, k, v, valid)[0]) < 0.06


def test_a_row_without_keys_is_empty():
    q, k, v, _ = case()
    out, lse = eight_bits(dense, native=False)(q, k, v, jnp.zeros(k.shape[:2], bool))
    assert not out.any() and (lse == -jnp.inf).all()
