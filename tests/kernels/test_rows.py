"""The kernels over rows, interpreted, against their formulas, alone, on a mesh and in a whole transformer."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention import api, ulysses
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.hardware.quantization import LARGEST, Quantization
from maxdiffusion.kernels import rows as kernels
from maxdiffusion.models import layers
from maxdiffusion.models.dit import rope, rows, transformer
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context, Frames
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.quantized import quantize

BATCH, TOKENS, HEADS, DIM = 2, 300, 3, 128  # a block of rows and a part of one
FEATURES = HEADS * DIM
EPS = 1e-6
BF16, F32 = jnp.bfloat16, jnp.float32


def normal(seed, *shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 3 + 1, dtype)


def near(ours, theirs, dtype):
    """Equal up to the last bit of fp32; rounded to bf16, some of these differ by its last bit."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-5)
    assert np.mean(ours != theirs) < (1e-3 if dtype == BF16 else 1)


def by_formula(x, gain, bias, second):
    gain, bias = (v if second is None else jnp.where(second[:, None], v[:, 1:], v[:, :1]) for v in (gain, bias))
    return layers.layer_norm(x, EPS) * gain + bias


@pytest.mark.parametrize("examples", [1, BATCH])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_layer_norm(dtype, two, examples):
    x = normal(0, BATCH, TOKENS, FEATURES, dtype=dtype)
    gain, bias = (normal(seed, examples, 1 + two, FEATURES) for seed in (1, 2))
    second = jnp.arange(TOKENS) % 3 == 0 if two else None
    theirs = by_formula(x, gain, bias, second)
    near(kernels.layer_norm(x, gain, bias, second, eps=EPS, dtype=dtype, interpret=True), theirs.astype(dtype), dtype)
    for name, largest in LARGEST.items():
        given = {"eps": EPS, "dtype": name, "largest": largest, "interpret": True}
        values, scale = kernels.layer_norm(x, gain, bias, second, **given)
        expected = quantize(theirs, name)
        np.testing.assert_allclose(scale, expected.scale, rtol=1e-6)
        assert np.mean(np.asarray(values, np.float32) != np.asarray(expected.values, np.float32)) < 1e-3


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("normed", "rotated", "given"), [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 0)])
def test_split_heads(dtype, normed, rotated, given):
    x = normal(0, BATCH, TOKENS, FEATURES, dtype=dtype)
    norm = layers.RMSNorm(FEATURES, EPS)
    norm.scale.value = normal(1, FEATURES)
    tables = rope.rotary_tables((3, 10, 10), DIM) if rotated else None
    ours = kernels.split_heads(
        x,
        HEADS,
        norm.scale[...] if normed else None,
        tables,
        norm.factor(x) if given else None,
        eps=EPS,
        interpret=True,
    )
    near(ours.swapaxes(1, 2), rows.split_heads(x, HEADS, norm if normed else None, tables), dtype)


def test_joined_heads_are_those_that_were_split():
    x = normal(0, BATCH, TOKENS, FEATURES, dtype=BF16)
    split = kernels.split_heads(x, HEADS, interpret=True)
    assert jnp.array_equal(kernels.join_heads(split, dtype=BF16, interpret=True), x)
    values, scale = kernels.join_heads(split, dtype="int8", largest=127.0, interpret=True)
    expected = quantize(x, "int8")
    assert jnp.array_equal(values, expected.values) and jnp.array_equal(scale, expected.scale)


@pytest.mark.parametrize("name", LARGEST)
def test_gelu_in_8_bits(name):
    x = normal(0, BATCH, TOKENS, FEATURES, dtype=BF16)
    values, scale = kernels.gelu(x, dtype=name, largest=LARGEST[name], interpret=True)
    expected = quantize(layers.gelu_tanh(x.astype(F32)), name)
    np.testing.assert_allclose(scale, expected.scale, rtol=1e-6)
    assert np.mean(np.asarray(values, np.float32) != np.asarray(expected.values, np.float32)) < 1e-3


def test_a_row_of_zeros_and_one_with_nan_in_8_bits():
    x = jnp.zeros((1, 2, 128), BF16).at[0, 1, 5].set(jnp.nan)
    values, scale = kernels.join_heads(x[:, None], dtype="int8", largest=127.0, interpret=True)
    assert not values[0, 0].any() and scale[0, 0, 0] == 1.0 and jnp.isnan(scale[0, 1, 0])


def test_the_first_two_axes_are_swapped():
    x = normal(0, 3, 2, 48, 128, dtype=BF16)
    assert jnp.array_equal(kernels.swap_leading(x, interpret=True), x.swapaxes(0, 1))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("degrees", [(2, 2, 2, 1), (1, 1, 4, 2)], ids=str)
def test_devices_compute_their_shards(degrees, dtype, monkeypatch):
    """Data 2 x fsdp 2 x context 2 leave a batch of 2 whole; tensor 2 splits the heads."""
    x, heads = normal(0, BATCH, 64, 4 * DIM), 4
    gain, bias = (normal(seed, BATCH, 2, 4 * DIM) for seed in (1, 2))
    clean, tables = jnp.arange(64) < 7, rope.rotary_tables((1, 8, 8), DIM)
    norm = layers.RMSNorm(4 * DIM, EPS)
    norm.scale.value = normal(3, 4 * DIM)

    def run(x):
        h = rows.layer_norm(x, gain, bias, clean, EPS, dtype)
        q = rows.split_heads(x, heads, norm, tables)
        k = rows.split_heads(x[:, :5], heads, norm, None, tokens=None)
        return h, q, k, rows.join_heads(q, dtype), rows.gelu(x, dtype)

    expected = jax.jit(run)(x)
    monkeypatch.setattr(rows, "_by_kernel", lambda features: True)
    mesh = parallel.make_mesh(parallel.Degrees(*degrees), ulysses=1, devices=jax.devices())
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        found = jax.jit(run)(x)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        one = ours.dtype == jnp.int8  # a value between two integers may become either
        ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1.0 if one else 2e-5)


SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": DIM, "ffn_dim": 256, "in_channels": 4}


@pytest.fixture
def as_on_tpus(monkeypatch):
    """Kernels over rows and Ulysses' swap, interpreted, and shards of whole tiles."""

    def multiple():
        return parallel.TILE_ROWS * parallel.degree(parallel.axes.SEQUENCE)

    swap = functools.partial(kernels.swap_leading, interpret=True)
    monkeypatch.setattr(rows, "_by_kernel", lambda features: features % DIM == 0)
    monkeypatch.setattr(ulysses, "platform", lambda: "tpu")
    monkeypatch.setattr(ulysses, "rows", types.SimpleNamespace(LANES=DIM, swap_leading=swap))
    for module in (transformer, api):
        monkeypatch.setattr(module, "token_multiple", multiple)


@pytest.mark.parametrize(("mode", "degrees"), [("ulysses", (2, 1, 2, 1)), ("ring", (1, 1, 2, 2))])
@pytest.mark.parametrize("quantization", [None, Quantization("int8")], ids=str)
def test_a_transformer_computes_what_it_computes_by_formulas(mode, degrees, quantization, request):
    """45 tokens, those of the first frame clean, in 32 rows on each of two devices."""
    config = DiTConfig(**SMALL, out_channels=4, text_dim=32, freq_dim=32)
    latents, first = normal(0, 2, 3, 6, 10, 4), normal(1, 2, 1, 6, 10, 4)
    context = Context(normal(2, 2, 7, 32), None, Frames(first=first))

    def run(plan, placement):
        graph, params = nnx.split(transformer.WanTransformer(config, plan, Dtypes(F32, F32, quantization)))
        rng = np.random.default_rng(0)

        def fill(p):
            whole = jnp.issubdtype(p.dtype, jnp.integer)
            values = rng.integers(-127, 128, p.shape) if whole else rng.standard_normal(p.shape) * 0.05
            return jnp.asarray(values, p.dtype)

        params = jax.tree.map(fill, params)
        with parallel.use(placement):
            call = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args))
            return np.asarray(call(params, latents, jnp.asarray([500.0, 300.0]), context))

    expected = run(AttentionPlan(), None)
    request.getfixturevalue("as_on_tpus")
    shards = 2 if mode == "ulysses" else 1
    plan = AttentionPlan.parse(mode, heads=2, context=2, ulysses_shards=shards, tensor=degrees[3])
    mesh = parallel.make_mesh(parallel.Degrees(*degrees), ulysses=shards, devices=jax.devices()[: math.prod(degrees)])
    found = run(plan, parallel.Placement(mesh, parallel.rules_for()))
    error = np.abs(found - expected) / np.abs(expected).max()
    # In 8 bits a value between two integers may become either.
    assert error.max() < (1e-6 if quantization is None else 5e-3) and np.median(error) < 1e-6
