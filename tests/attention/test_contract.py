"""Every mode on every mesh equals dense attention, whatever the number of tokens and the mask.

Bounds are relative to the largest value: 2e-6 in fp32; in bf16 8e-3, one rounding (2^-9) of weights, outputs and, on a
mesh, of nothing else, because partial results are merged in fp32.
"""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxdiffusion import parallel
from maxdiffusion.attention import AttentionPlan, chunked, cross_attention, self_attention
from tests.attention import reference

BOUND = {jnp.float32: 2e-6, jnp.bfloat16: 8e-3}
# (data, ring, ulysses) -> token counts: divides, does not, leaves whole shards empty, is shorter than the shard count.
TOKENS = {
    (1, 1, 8): (16, 13, 9, 3),
    (1, 2, 4): (16, 13, 9, 3),
    (1, 4, 2): (16, 13, 9, 3),
    (1, 8, 1): (16, 13, 9, 3),
    (2, 2, 2): (16, 13, 5, 3),
}
MESHES = list(TOKENS)
SCHEMES = {
    (1, 1, 8): ("ulysses", "ulysses_ring"),
    (1, 8, 1): ("ring", "ulysses_ring"),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """The tiny inputs would otherwise all be small enough for dense attention."""
    monkeypatch.setattr(chunked, "SMALL", 0)
    monkeypatch.setattr(chunked, "CHUNK", 3)


def placement(data, ring, ulysses, tensor=1, fsdp=1):
    degrees = parallel.Degrees(data, fsdp, ring * ulysses, tensor)
    devices = jax.devices()[: data * fsdp * ring * ulysses * tensor]
    return parallel.Placement(parallel.make_mesh(degrees, ulysses=ulysses, devices=devices), parallel.rules_for())


def check(plan, place, cases, bound, dtype=jnp.float32):
    """One compilation for all cases: (tokens, keys, masked) with keys None for self-attention.

    Without LLVM's optimisation, which halves the time of these tests.
    """
    made = [reference.inputs(s, k, dtype=dtype, seed=i) for i, (s, k, _) in enumerate(cases)]
    args = [(q, k, v, mask if masked else None) for (q, k, v, mask), (_, _, masked) in zip(made, cases, strict=True)]

    @jax.jit
    def run(args):
        return [
            (self_attention if keys is None else cross_attention)(plan, *a)
            for a, (_, keys, _) in zip(args, cases, strict=True)
        ]

    with parallel.use(place):
        outs = run.lower(args).compile(compiler_options={"xla_backend_optimization_level": 0})(args)
    for case, a, out in zip(cases, args, outs, strict=True):
        assert out.dtype == dtype
        assert reference.error(out, reference.attention(*a)[0]) < bound, (plan, case)


def cases(tokens):
    return [(s, keys, masked) for s in tokens for keys in (None, 7) for masked in (False, True)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_2d_sharding_is_exact(mesh):
    _, ring, ulysses = mesh
    plan = AttentionPlan("ulysses_ring", "chunked", ring, ulysses, reference.HEADS)
    check(plan, placement(*mesh), cases(TOKENS[mesh]), BOUND[jnp.float32])


def every_mode():
    for mesh in MESHES:
        for scheme in ("local", *SCHEMES.get(mesh, ("ulysses_ring",))):
            for kernel in reference.RUN_HERE:
                for dtype in BOUND:
                    yield pytest.param(mesh, scheme, kernel, dtype, id=f"{mesh}-{scheme}-{kernel}-{dtype.__name__}")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "scheme", "kernel", "dtype"), list(every_mode()))
def test_every_mode_is_exact(mesh, scheme, kernel, dtype):
    ring, ulysses = (1, 1) if scheme == "local" else mesh[1:]
    plan = AttentionPlan(scheme, kernel, ring, ulysses, reference.HEADS)
    check(plan, placement(*mesh), cases(TOKENS[mesh]), BOUND[dtype], dtype)


@pytest.mark.parametrize("name", ["dot_product", "chunked", "ring", "ulysses", "ulysses_ring", "auto"])
def test_every_name_runs(name):
    plan = AttentionPlan.parse(name, heads=reference.HEADS, context=4, platform="cpu")
    place = placement(1, 4 // plan.ulysses, plan.ulysses)
    check(plan, place, [(9, None, True)], BOUND[jnp.float32])


@pytest.mark.parametrize(
    ("ring", "ulysses", "chunks", "direction"),
    [(1, 4, 2, "one_way"), (2, 2, 4, "one_way"), (3, 1, 1, "two_way"), (4, 2, 2, "two_way")],
)
def test_chunks_and_both_directions(ring, ulysses, chunks, direction):
    plan = AttentionPlan(
        "ulysses_ring", "chunked", ring, ulysses, reference.HEADS, chunks=chunks, ring_direction=direction
    )
    check(plan, placement(1, ring, ulysses), [(21, None, True), (3, None, False)], BOUND[jnp.float32])


@pytest.mark.parametrize("kernel", ["flash", "splash", "tokamax_splash"])
def test_the_kernels_of_tpus_interpreted(kernel):
    plan = AttentionPlan("ulysses_ring", kernel, 2, 2, reference.HEADS)
    check(plan, placement(1, 2, 2), [(9, None, True), (5, 7, False)], BOUND[jnp.float32])


def test_bfloat16():
    plan = AttentionPlan("ulysses_ring", "chunked", 2, 2, reference.HEADS)
    check(plan, placement(1, 2, 2), [(9, None, True), (5, 7, False)], BOUND[jnp.bfloat16], jnp.bfloat16)


@pytest.mark.parametrize("name", ["ring", "ulysses", "ulysses_ring"])
def test_one_device_needs_no_placement(name):
    plan = AttentionPlan.parse(name, heads=reference.HEADS, context=1)
    check(plan, None, [(9, None, True), (5, 7, False)], BOUND[jnp.float32])


def test_heads_over_tensor_and_batch_over_fsdp():
    plan = AttentionPlan("ulysses_ring", "chunked", 1, 2, reference.HEADS, tensor=2)
    check(plan, placement(1, 1, 2, tensor=2, fsdp=2), [(9, None, True), (5, 7, True)], BOUND[jnp.float32])


def test_a_batch_that_does_not_divide_is_replicated():
    plan = AttentionPlan("ulysses_ring", "chunked", 2, 1, reference.HEADS)
    q, k, v, mask = reference.inputs(7, batch=3)
    with parallel.use(placement(2, 2, 1)):
        out = jax.jit(lambda *a: self_attention(plan, *a))(q, k, v, mask)
    assert reference.error(out, reference.attention(q, k, v, mask)[0]) < BOUND[jnp.float32]


def test_an_example_without_keys_gives_zero_on_every_hop():
    plan = AttentionPlan("ulysses_ring", "chunked", 2, 2, reference.HEADS)
    q, k, v, mask = reference.inputs(13)
    mask = mask.at[1].set(False)
    with parallel.use(placement(1, 2, 2)):
        out = jax.jit(lambda *a: self_attention(plan, *a))(q, k, v, mask)
    assert not out[1].any()
    assert reference.error(out, reference.attention(q, k, v, mask)[0]) < BOUND[jnp.float32]


def test_gradients_cross_the_mesh():
    plan = AttentionPlan("ulysses_ring", "chunked", 2, 2, reference.HEADS)
    q, k, v, mask = reference.inputs(13)

    def loss(run, *a):
        return (run(*a, mask) ** 2).sum()

    def gradients(plan):
        return jax.jit(jax.grad(lambda *a: loss(lambda *b: self_attention(plan, *b), *a), argnums=(0, 1, 2)))(q, k, v)

    with parallel.use(placement(1, 2, 2)):
        got = gradients(plan)
    want = gradients(AttentionPlan())
    for one, other in zip(got, want, strict=True):
        assert jnp.isfinite(one).all()
        assert jnp.abs(one - other).max() < 1e-5 * jnp.abs(other).max()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    mesh=st.sampled_from([(1, 2, 2), (1, 3, 1), (2, 1, 2), (1, 2, 1), (1, 1, 4)]),
    tokens=st.integers(1, 40),
    keys=st.none() | st.integers(1, 20),
    masked=st.booleans(),
    kernel=st.sampled_from(["dot_product", "chunked"]),
)
def test_random_shapes(mesh, tokens, keys, masked, kernel):
    plan = AttentionPlan("ulysses_ring", kernel, *mesh[1:], reference.HEADS)
    check(plan, placement(*mesh), [(tokens, keys, masked)], BOUND[jnp.float32])
