"""Attention in float64 numpy, and the inputs that the tests share."""

import jax.numpy as jnp
import numpy as np

from maxdiffusion.attention.kernels import KERNELS

HEADS, DIM = 8, 12
RUN_HERE = [name for name in KERNELS if name != "cudnn_flash"]  # TPU kernels are interpreted


def inputs(tokens, keys=None, *, batch=2, heads=HEADS, dim=DIM, dtype=jnp.float32, seed=0):
    """q, k, v of the dtype, and a mask that differs per example and keeps at least one key of each."""
    rng = np.random.default_rng(seed)
    keys = tokens if keys is None else keys
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, n, heads, dim), dtype=np.float32), dtype) for n in (tokens, keys, keys)
    )
    mask = rng.random((batch, keys)) < 0.6
    mask[np.arange(batch), rng.integers(keys, size=batch)] = True
    return q, k, v, jnp.asarray(mask)


def attention(q, k, v, valid=None):
    """(out, lse) in float64; rows without a key give (0, -inf)."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    logits = np.einsum("bsnd,bknd->bnsk", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        logits = np.where(np.asarray(valid)[:, None, None, :], logits, -np.inf)
    top = np.where(np.isneginf(logits.max(-1, keepdims=True)), 0, logits.max(-1, keepdims=True))
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bnsk,bknd->bsnd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return out, lse.transpose(0, 2, 1)


def error(got, want):
    """Largest absolute error over the largest absolute value."""
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return np.abs(got - want).max() / np.abs(want).max()
