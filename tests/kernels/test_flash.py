"""The kernel, interpreted, with several blocks of queries and keys; whole calls are in attention/test_contract.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.flash import flash
from maxdiffusion.kernels.flash import LOOSEST, bounding_ball, flash_attention

S, K, D = 384, 640, 128


@pytest.fixture(scope="module")
def case():
    """q, k, v and a mask: the first example keeps the keys before 300, the second those from 320 on."""
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


def ball(k, valid=None, block=128):
    return bounding_ball(jnp.asarray(k), None if valid is None else jnp.asarray(valid), block=block, interpret=True)


def looseness(q, radius):
    """By how much the bound of a row may exceed its largest logit."""
    return np.linalg.norm(np.asarray(q), axis=-1) * np.asarray(radius)[..., None]


# Blocks that hold several strips and parts with a rest, one of each, and everything at once.
@pytest.mark.parametrize(
    ("block_q", "block_kv", "compute", "span"), [(384, 640, 128, 384), (128, 640, 128, 128), (128, 128, 128, 128)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_blocks_do_not_change_the_result(case, block_q, block_kv, compute, span, masked, running):
    q, k, v, valid = case
    mask = jnp.asarray(valid) if masked else None
    center, radius = ball(k, mask)
    assert looseness(q, radius).max() < LOOSEST
    radius = jnp.full_like(radius, jnp.inf) if running else radius
    sizes = {"block_q": block_q, "block_kv": block_kv, "compute": compute, "span": span, "strip": 256}
    run = functools.partial(flash_attention, **sizes, interpret=True)
    out, lse = jax.jit(run)(q, k, v, center, radius, mask)
    want, want_lse = reference(q, k, v, valid if masked else np.ones_like(valid))
    assert np.abs(out - want).max() < 2e-6 * np.abs(want).max()
    assert np.abs(lse - want_lse).max() < 5e-6


@pytest.mark.parametrize("tokens", [384, 333])
@pytest.mark.parametrize("running", [False, True])
def test_the_result_for_other_keys_is_merged(case, tokens, running):
    """Each half of the keys in its own call; of the second example, the first half is masked, then everything."""
    *arrays, valid = case
    valid = valid.copy()
    q, k, v = map(jnp.asarray, arrays)
    q = q[:, :, :tokens]
    run = functools.partial(
        flash_attention, block_q=128, block_kv=128, compute=128, span=128, strip=256, interpret=True
    )
    for case_valid in (valid, np.stack([valid[0], np.zeros(K, bool)])):
        other = None
        for half in (slice(0, 384), slice(384, K)):
            keys, mask = jnp.asarray(k[:, :, half]), jnp.asarray(case_valid[:, half])
            center, radius = ball(keys, mask)
            radius = jnp.full_like(radius, jnp.inf) if running else radius
            other = run(q, keys, v[:, :, half], center, radius, mask, other, dtype=jnp.float32)
        out, lse = other
        want, want_lse = reference(*(np.asarray(x) for x in (q, k, v)), case_valid)
        assert np.abs(out - want).max() < 2e-6 * np.abs(want).max()
        np.testing.assert_allclose(lse, want_lse, atol=5e-6)


def test_a_row_with_nan_stays_alone_where_results_are_merged(case):
    q, k, v = map(jnp.asarray, case[:3])
    q = q.at[0, 0, 7].set(jnp.nan)
    sizes = {"block_q": 128, "block_kv": 640, "compute": 128, "span": 128, "strip": 256, "interpret": True}
    own = flash_attention(q, k, v, *ball(k), **sizes)
    out, lse = flash_attention(q, k, v, *ball(k), None, own, **sizes)
    want, _ = reference(*case[:3], np.ones((2, K), bool))
    rows = np.ones((2, 1, S), bool)
    rows[0, 0, 7] = False
    assert np.isnan(out[0, 0, 7]).all() and np.isnan(lse[0, 0, 7])
    assert np.abs(out - want)[rows].max() < 2e-6 * np.abs(want).max()


def test_a_block_without_keys_is_skipped_and_a_row_without_any_is_empty(case):
    q, k, v, valid = case
    valid = valid.copy()
    valid[1] = False
    bad_k, bad_v = (np.where(valid[:, None, :, None], x, np.nan) for x in (k, v))
    center, radius = ball(bad_k, valid)
    sizes = {"block_q": 384, "block_kv": 128, "compute": 128, "span": 128, "strip": 256}
    run = jax.jit(functools.partial(flash_attention, **sizes, interpret=True))
    out, lse = run(q, bad_k, bad_v, center, radius.at[1].set(jnp.inf), jnp.asarray(valid))
    want, _ = reference(q, k, v, valid)
    assert np.abs(out[0] - want[0]).max() < 2e-6 * np.abs(want).max()
    assert not out[1].any() and (lse[1] == -jnp.inf).all()


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_a_bound_holds_and_is_as_loose_as_it_says(case, shift):
    q, k, _, valid = case
    k = k + np.float32(shift)
    logits = np.where(valid[:, None, None], np.einsum("bnsd,bnkd->bnsk", q, k), -np.inf)
    center, radius = map(np.asarray, ball(np.where(valid[:, None, :, None], k, np.nan), valid))
    over = (q * center[:, :, None]).sum(axis=-1) + looseness(q, radius) - logits.max(axis=-1)
    assert over.min() > -1e-3 and (over <= looseness(q, radius) + 1e-3).all()
    assert looseness(q, radius).max() < 30  # does not depend on the mean of the keys


def test_heads_whose_bound_is_too_loose_keep_a_running_maximum():
    """One head of either kind; rows of the second have logits hundreds apart."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 150, 2, 16), dtype=np.float32)) for _ in range(3))
    q = q.at[:, :, 1].multiply(60)
    valid = jnp.arange(150)[None] < 140
    radius = ball(k[:, :140].transpose(0, 2, 1, 3), block=140)[1]
    loose = looseness(q.transpose(0, 2, 1, 3) * math.log2(math.e) / 4, radius).max(axis=-1)
    assert loose[0, 0] < LOOSEST < loose[0, 1]
    (out, lse), (want, want_lse) = flash(q, k, v, valid), dense(q, k, v, valid)
    assert jnp.abs(out - want).max() < 1e-5 * jnp.abs(want).max()
    assert jnp.abs(lse - want_lse).max() < 1e-6 * jnp.abs(want_lse).max()


@pytest.mark.parametrize("tokens", [384, 333])
def test_each_block_of_queries_decides_for_itself(case, tokens):
    """The second block has a row whose logits are hundreds apart; the last one may reach beyond the queries."""
    q, k, v, valid = case
    q = q[:, :, :tokens].copy()
    q[:, :, 200] *= 300
    center, radius = ball(k, valid)
    loose = looseness(q, radius).max(axis=1)
    assert loose[:, 200].min() > LOOSEST > np.delete(loose, 200, axis=1).max()
    sizes = {"block_q": 128, "block_kv": 128, "compute": 128, "span": 128, "strip": 256}
    out, lse = jax.jit(functools.partial(flash_attention, **sizes, interpret=True))(
        q, k, v, center, radius, jnp.asarray(valid)
    )
    want, want_lse = reference(q, k, v, valid)
    assert np.abs(out - want).max() < 5e-6 * np.abs(want).max()
    assert np.abs(lse - want_lse).max() < 1e-6 * np.abs(want_lse).max()
