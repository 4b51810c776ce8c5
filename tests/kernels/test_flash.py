"""The kernel itself, interpreted, in several blocks of either side; what a whole call must hold is in the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
@pytest.mark.parametrize(("block_q", "block_kv", "compute"), [(384, 640, 256), (128, 128, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_do_not_change_the_result(case, block_q, block_kv, compute, masked):
    q, k, v, valid = case
    run = functools.partial(flash_attention, block_q=block_q, block_kv=block_kv, compute=compute, interpret=True)
    out, lse = jax.jit(run)(q, k, v, jnp.asarray(valid) if masked else None)
    want, want_lse = reference(q, k, v, valid if masked else np.ones_like(valid))
    assert np.abs(out - want).max() < 2e-6 * np.abs(want).max()
    assert np.abs(lse - want_lse).max() < 5e-6


def test_a_block_without_keys_is_skipped_and_a_row_without_any_is_empty(case):
    q, k, v, valid = case
    valid = valid.copy()
    valid[1] = False
    bad = np.where(valid[:, None, :, None], v, np.nan)  # only whole blocks of 128 hold no key of the first example
    bad[0, :, 300:384] = 0
    out, lse = jax.jit(functools.partial(flash_attention, block_q=384, block_kv=128, compute=128, interpret=True))(
        q, k, bad, jnp.asarray(valid)
    )
    want, _ = reference(q, k, v, valid)
    assert np.abs(out[0] - want[0]).max() < 2e-6 * np.abs(want).max()
    assert not out[1].any() and (lse[1] == -jnp.inf).all()
