"""The local kernels and the merge, on one device, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion import parallel
from maxdiffusion.attention import chunked
from maxdiffusion.attention.api import self_attention
from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.kernels import KERNELS, Kernel
from maxdiffusion.attention.merge import merge
from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from tests.support import attention_reference as reference

CASES = [(1, 1, jnp.float32), (64, 64, jnp.float32), (61, 7, jnp.float32), (7, 61, jnp.bfloat16)]


DIFFERENTIABLE = ("dot_product", "chunked")


@pytest.fixture
def kernel(request, monkeypatch):
    monkeypatch.setattr(chunked, "SMALL", 0)
    monkeypatch.setattr(chunked, "CHUNK", 16)
    return jax.jit(KERNELS[request.param].local())


@pytest.mark.parametrize("kernel", reference.RUN_HERE, indirect=True)
@pytest.mark.parametrize(("tokens", "keys", "dtype"), CASES)
def test_output_and_log_sum_exp(kernel, tokens, keys, dtype):
    q, k, v, mask = reference.inputs(tokens, keys, dtype=dtype)
    for valid in (None, mask):
        out, lse = kernel(q, k, v, valid)
        want, want_lse = reference.attention(q, k, v, valid)
        assert lse.dtype == jnp.float32 and out.dtype in (jnp.float32, v.dtype)
        assert reference.error(out, want) < (2e-6 if dtype == jnp.float32 else 8e-3)
        # Splash rounds the scaled queries to bf16.
        assert np.abs(lse - want_lse).max() < (5e-6 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("kernel", reference.RUN_HERE, indirect=True)
def test_large_logits_do_not_overflow(kernel):
    q, k, v, mask = reference.inputs(20)
    want, want_lse = reference.attention(q * 300, k, v, mask)
    out, lse = kernel(q * 300, k, v, mask)
    assert reference.error(out, want) < 1e-4
    assert np.abs(lse - want_lse).max() < 1e-3


@pytest.mark.parametrize("kernel", reference.RUN_HERE, indirect=True)
def test_a_row_without_keys_is_zero_and_minus_infinity(kernel):
    q, k, v, mask = reference.inputs(20)
    mask = mask.at[0].set(False)
    out, lse = kernel(q, k, v, mask)
    assert not out[0].any() and (lse[0] == -jnp.inf).all() and jnp.isfinite(lse[1]).all()


@pytest.mark.parametrize("kernel", DIFFERENTIABLE, indirect=True)
def test_a_row_without_keys_has_no_gradient(kernel):
    q, k, v, mask = reference.inputs(20)
    mask = mask.at[0].set(False)
    grads = jax.jit(jax.grad(lambda *a: (kernel(*a, mask)[0] ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(g).all() and not g[0].any() for g in grads)


@pytest.mark.parametrize("kernel", DIFFERENTIABLE, indirect=True)
def test_gradients_agree(kernel):
    q, k, v, mask = reference.inputs(20)

    def loss(run, *a):
        out, lse = run(*a, mask)
        return (out**2).sum() + lse.sum()

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 2)))(q, k, v)
        for run in (kernel, KERNELS["dot_product"].local())
    )
    for one, other in zip(got, want, strict=True):
        assert jnp.abs(one - other).max() < 1e-5 * jnp.abs(other).max()


def test_chunked_memory_is_linear_in_the_tokens():
    def temporary(tokens):
        q, k, v = (jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32) for _ in range(3))
        return jax.jit(KERNELS["chunked"].local()).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096) < 2 * 4 * 2 * 4096**2 / 4


@pytest.mark.parametrize("cut", [0, 9])
def test_merge_joins_any_split_of_the_keys(cut):
    q, k, v, mask = reference.inputs(20)
    mask = mask.at[0, :12].set(False)
    dense = jax.jit(KERNELS["dot_product"].local())
    parts = [dense(q, k[:, part], v[:, part], mask[:, part]) for part in (slice(0, cut), slice(cut, 20))]
    for one, other in (parts, parts[::-1]):
        out, lse = jax.jit(merge)(*one, *other)
        want, want_lse = reference.attention(q, k, v, mask)
        assert reference.error(out, want) < 2e-6
        assert np.abs(lse - want_lse).max() < 5e-6


def test_merging_nothing_with_nothing_is_nothing_also_in_the_gradient():
    out, lse = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), -jnp.inf)
    merged = jax.jit(merge)(out, lse, out, lse)
    assert not merged[0].any() and (merged[1] == -jnp.inf).all()
    assert all(
        jnp.isfinite(g).all()
        for g in jax.jit(jax.grad(lambda *a: merge(*a, out, lse)[0].sum(), argnums=(0, 1)))(out, lse)
    )


@pytest.mark.parametrize("kernel", reference.RUN_HERE, indirect=True)
def test_nan_stays_in_its_row_and_out_of_what_is_masked(kernel):
    q, k, v, mask = reference.inputs(9, 11)
    q = q.at[:, :, 0].multiply(100)  # flash: beyond the bound, so that this head keeps a running maximum
    clean, clean_lse = kernel(q, k, v, mask)
    hidden = ~mask[:, :, None, None]
    out, lse = kernel(q.at[:, 4].set(np.nan), jnp.where(hidden, np.nan, k), jnp.where(hidden, np.nan, v), mask)
    assert jnp.isnan(out[:, 4]).all() and jnp.isnan(lse[:, 4]).all()
    for got, want in ((out, clean), (lse, clean_lse)):
        got, want = np.delete(got, 4, axis=1), np.delete(want, 4, axis=1)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_merging_a_row_of_nan_is_nan_in_that_row():
    q, k, v, _ = reference.inputs(5, 8)
    q = q.at[:, 2].set(np.nan)
    out, lse = jax.jit(merge)(*dense(q, k[:, :4], v[:, :4]), *dense(q, k[:, 4:], v[:, 4:]))
    assert jnp.isnan(out[:, 2]).all() and jnp.isnan(lse[:, 2]).all()
    assert jnp.isfinite(jnp.delete(out, 2, axis=1)).all()


calls = []


def added(q, k, v, valid=None, *, options):
    """The kernel of the test below."""
    calls.append((k.shape[1], options))
    return dense(q, k, v, valid)


def test_a_kernel_is_added_by_one_row(monkeypatch):
    row = Kernel(
        "added", f"{__name__}:added", ("cpu",), ("float32",), ("block_q",), names={"local": "mine", "ring": "mine_ring"}
    )
    monkeypatch.setitem(KERNELS, row.name, row)
    given = {"heads": reference.HEADS, "context": 2, "options": KernelOptions(block_q=32)}
    plan = AttentionPlan.parse("mine_ring", **given)
    mesh = parallel.make_mesh(parallel.Degrees(context=2), devices=jax.devices()[:2])
    q, k, v, mask = reference.inputs(13)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        out = jax.jit(lambda *a: self_attention(plan, *a))(q, k, v, mask)
    assert reference.error(out, reference.attention(q, k, v, mask)[0]) < 2e-6
    assert calls == [(7, KernelOptions(block_q=32))] * 2
    for refused, words in (
        ({"platform": "tpu"}, "lacks on tpu; choose auto or one of dot_product"),
        ({"dtype": "bfloat16"}, "attention=mine computes in float32, not bfloat16"),
        ({"options": KernelOptions(block_kv=128)}, "block_kv=128 is not used by the attention kernel added"),
    ):
        with pytest.raises(UserError, match=words):
            AttentionPlan.parse("mine", **{**given, **refused})
