"""The kernel itself, interpreted, in several blocks of either side; what a whole call must hold is in the contract."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.flash import LOOSEST, bounds, flash, harmless
from maxdiffusion.kernels.flash import flash_attention

S, K, D = 384, 640, 128


@pytest.fixture(scope="module")
def case():
    """q, k, v and masks: of an example, the second block of keys counts in part, and the first one not at all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 1, n, D), dtype=np.float32) for n in (S, K, K))
    valid = np.ones((2, K), bool)
    valid[0, 300:] = False
    valid[1, :320] = False
    return q / 8, k, v, valid


def reference(q, k, v, valid):
    logits = np.where(
        valid[:, None, None], np.einsum("bnsd,bnkd->bnsk", *(x.astype(np.float64) for x in (q, k))), -np.inf
    )
    with np.errstate(divide="ignore"):
        lse = np.logaddexp2.reduce(logits, axis=-1)
    weights = np.exp2(logits - np.where(np.isneginf(lse), 0, lse)[..., None])
    return np.einsum("bnsk,bnkd->bnsd", weights, v), lse


# Blocks that hold several strips and parts with a rest, one of each, and everything at once.
@pytest.mark.parametrize(
    ("block_q", "block_kv", "compute", "span"), [(384, 640, 128, 384), (128, 640, 128, 128), (128, 128, 128, 128)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_blocks_do_not_change_the_result(case, block_q, block_kv, compute, span, masked, running):
    q, k, v, valid = case
    mask = jnp.asarray(valid) if masked else None
    keys, values = harmless(jnp.asarray(k), jnp.asarray(v), mask)
    bound, looseness = bounds(jnp.asarray(q), keys)
    assert looseness.max() < LOOSEST
    sizes = {"block_q": block_q, "block_kv": block_kv, "compute": compute, "span": span, "strip": 256}
    run = functools.partial(flash_attention, **sizes, interpret=True)
    out, lse = jax.jit(run)(q, keys, values, bound, jnp.full((2, 1), not running), mask)
    want, want_lse = reference(q, k, v, valid if masked else np.ones_like(valid))
    assert np.abs(out - want).max() < 2e-6 * np.abs(want).max()
    assert np.abs(lse - want_lse).max() < 5e-6


def test_a_block_without_keys_is_skipped_and_a_row_without_any_is_empty(case):
    q, k, v, valid = case
    valid = valid.copy()
    valid[1] = False
    bad_k, bad_v = (np.where(valid[:, None, :, None], x, np.nan) for x in (k, v))
    keys, values = harmless(jnp.asarray(bad_k), jnp.asarray(bad_v), jnp.asarray(valid))
    bound, sound = bounds(jnp.asarray(q), keys)[0], jnp.array([[True], [False]])
    sizes = {"block_q": 384, "block_kv": 128, "compute": 128, "span": 128, "strip": 256}
    run = jax.jit(functools.partial(flash_attention, **sizes, interpret=True))
    out, lse = run(q, keys, values, bound, sound, jnp.asarray(valid))
    want, _ = reference(q, k, v, valid)
    assert np.abs(out[0] - want[0]).max() < 2e-6 * np.abs(want).max()
    assert not out[1].any() and (lse[1] == -jnp.inf).all()


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_a_bound_holds_and_is_as_loose_as_it_says(case, shift):
    q, k, _, valid = case
    k = k + np.float32(shift)
    logits = np.where(valid[:, None, None], np.einsum("bnsd,bnkd->bnsk", q, k), -np.inf)
    keys, _ = harmless(jnp.asarray(k), jnp.zeros((2, 1, K, D)), jnp.asarray(valid))
    bound, looseness = bounds(jnp.asarray(q), keys)
    over = np.asarray(bound) - logits.max(axis=-1)
    assert over.min() > -1e-3 and (over.max(axis=-1) <= np.asarray(looseness) + 1e-3).all()
    assert looseness.max() < 30  # the mean of the keys does not count


def test_heads_whose_bound_is_too_loose_keep_a_running_maximum():
    """One head of either kind; rows of the second have logits hundreds apart."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 150, 2, 16), dtype=np.float32)) for _ in range(3))
    q = q.at[:, :, 1].multiply(60)
    valid = jnp.arange(150)[None] < 140
    keys, _ = harmless(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), valid)
    looseness = bounds(q.transpose(0, 2, 1, 3) * math.log2(math.e) / 4, keys)[1]
    assert looseness[0, 0] < LOOSEST < looseness[0, 1]
    (out, lse), (want, want_lse) = flash(q, k, v, valid), dense(q, k, v, valid)
    assert jnp.abs(out - want).max() < 1e-5 * jnp.abs(want).max()
    assert jnp.abs(lse - want_lse).max() < 1e-6 * jnp.abs(want_lse).max()
