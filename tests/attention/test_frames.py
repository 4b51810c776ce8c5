"""Self-attention with further keys for each frame against one softmax over all keys, masked and biased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion import parallel
from maxdiffusion.attention import api, frames
from maxdiffusion.attention.api import self_attention
from maxdiffusion.attention.frames import FrameKeys, by_shard
from maxdiffusion.attention.plan import AttentionPlan

FRAMES, PER_FRAME, HEADS = 5, 7, 4  # 35 tokens over 8 devices: 5 each, and 5 of padding


def drawn(seed, frames):
    return jax.random.normal(jax.random.key(seed), (2, frames * PER_FRAME, HEADS, 8))


def expected(log_scale):
    q, k, v, more_k, more_v = inputs()
    keys, values = (np.concatenate(pair, axis=1) for pair in ((k, more_k), (v, more_v)))
    logits = np.einsum("bsnd,bknd->bnsk", q, keys) / 8**0.5
    query, key = np.arange(q.shape[1]) // PER_FRAME, np.arange(k.shape[1]) // PER_FRAME
    further = np.arange(more_k.shape[1]) // PER_FRAME + 1
    bias = np.where(key == 1, log_scale, 0.0)[None].repeat(len(query), 0)
    logits += np.concatenate([bias, np.where(query[:, None] == further, 0.0, -np.inf)], axis=1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnsk,bknd->bsnd", weights / weights.sum(-1, keepdims=True), values)


def inputs():
    return *(drawn(seed, FRAMES) for seed in range(3)), *(drawn(seed, FRAMES - 1) for seed in (3, 4))


def computed(plan, log_scale):
    @jax.jit
    def run(q, k, v, more_k, more_v):
        more = (by_shard(x, q.shape[1], PER_FRAME) for x in (more_k, more_v))
        return self_attention(plan, q, k, v, frames=FrameKeys(*more, PER_FRAME), log_scale=log_scale)

    return run(*inputs())


@pytest.mark.parametrize("log_scale", [0.0, -1.3])
def test_one_device(log_scale):
    np.testing.assert_allclose(computed(AttentionPlan(), log_scale), expected(log_scale), atol=2e-6)


@pytest.mark.parametrize("log_scale", [0.0, -1.3])
@pytest.mark.parametrize(("name", "ulysses"), [("ring", 1), ("ulysses_ring", 4), ("dot_product", 1)])
def test_eight_devices(name, ulysses, log_scale):
    place = parallel.Placement(parallel.make_mesh(parallel.Degrees(context=8), ulysses=ulysses), parallel.rules_for(()))
    plan = AttentionPlan.parse(name, heads=HEADS, context=8, ulysses_shards=ulysses, tensor=1)
    with parallel.use(place):
        found = computed(plan, log_scale)
    np.testing.assert_allclose(found, expected(log_scale), atol=2e-6)


def test_shards_of_more_rows_than_they_have_tokens(monkeypatch):
    """Two devices of 20 rows, as padding to tiles makes them: the second has 15 tokens."""
    for module in (api, frames):
        monkeypatch.setattr(module, "token_multiple", lambda: 20 * parallel.degree(parallel.axes.SEQUENCE))
    mesh = parallel.make_mesh(parallel.Degrees(context=2), ulysses=1, devices=jax.devices()[:2])
    plan = AttentionPlan.parse("ring", heads=HEADS, context=2, ulysses_shards=1, tensor=1)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        np.testing.assert_allclose(computed(plan, -1.3), expected(-1.3), atol=2e-6)


def test_a_shard_has_the_frames_that_its_tokens_begin_and_end_in():
    place = parallel.Placement(parallel.make_mesh(parallel.Degrees(context=8)), parallel.rules_for(()))
    frames = jnp.repeat(jnp.arange(1.0, FRAMES), PER_FRAME)[None, :, None, None]
    with parallel.use(place):
        found = by_shard(frames, FRAMES * PER_FRAME, PER_FRAME)[0, :, ::PER_FRAME, 0, 0]
    # Tokens 0-4, 5-9, 10-14, ...: of one or two frames of 7; frame 0 and those behind the last are zeros.
    np.testing.assert_array_equal(found, [[0, 1], [0, 1], [1, 2], [2, 3], [2, 3], [3, 4], [4, 0], [0, 0]])
