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
from maxdiffusion.attention import chunked
from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.plan import AttentionPlan, names
from tests.support import attention_reference as reference

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


def every_case(tokens):
    return [(s, keys, masked) for s in tokens for keys in (None, 7) for masked in (False, True)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_2d_sharding_is_exact(mesh):
    """A part of the matrix below that is quick to compile."""
    _, ring, ulysses = mesh
    plan = AttentionPlan("ulysses_ring", "chunked", ring, ulysses, reference.HEADS)
    divides, does_not, empty, shorter = TOKENS[mesh]
    some = [(divides, None, False), (does_not, None, False), (empty, None, True), (shorter, None, True)]
    check(plan, placement(*mesh), [*some, (does_not, 7, True), (shorter, 7, False)], BOUND[jnp.float32])


def every_mode():
    """Scheme x kernel x mesh x dtype, and the options of a scheme with one kernel."""
    for mesh in MESHES:
        schemes = SCHEMES.get(mesh, ("ulysses_ring",))
        for scheme in ("local", *schemes):
            for kernel in reference.RUN_HERE:
                for dtype in BOUND:
                    yield mesh, scheme, kernel, dtype, {}
        _, ring, ulysses = mesh
        if 1 < ulysses < reference.HEADS:
            yield mesh, "ulysses_ring", "chunked", jnp.float32, {"chunks": reference.HEADS // ulysses}
        if ring > 1:
            yield mesh, "ulysses_ring", "chunked", jnp.float32, {"ring_direction": "two_way"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "scheme", "kernel", "dtype", "options"),
    [
        pytest.param(*mode, id=f"{mode[0]}-{mode[1]}-{mode[2]}-{mode[3].__name__}-{[*mode[4].values()]}")
        for mode in every_mode()
    ],
)
def test_every_mode_is_exact(mesh, scheme, kernel, dtype, options):
    ring, ulysses = (1, 1) if scheme == "local" else mesh[1:]
    plan = AttentionPlan(scheme, kernel, ring, ulysses, reference.HEADS, **options)
    check(plan, placement(*mesh), every_case(TOKENS[mesh]), BOUND[dtype], dtype)


ON_CPU = ["dot_product", "chunked", "ring", "ulysses", "ulysses_ring", "auto"]
ON_TPU = ["flash", "splash", "tokamax_flash", "tokamax_ring"]  # interpreted


@pytest.mark.parametrize(("name", "platform"), [*((n, "cpu") for n in ON_CPU), *((n, "tpu") for n in ON_TPU)])
def test_every_name_runs(name, platform):
    plan = AttentionPlan.parse(name, heads=reference.HEADS, context=4, platform=platform)
    place = placement(1, 4 // plan.ulysses, plan.ulysses)
    check(plan, place, [(9, None, True)], BOUND[jnp.float32])


def test_no_name_is_left_out():
    assert {*ON_CPU, *ON_TPU, "cudnn_flash"} == {"auto", *names()}  # that one is in test_cudnn.py


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("chunked", jnp.float32),
        *(
            pytest.param(kernel, dtype, marks=pytest.mark.slow)
            for kernel in reference.RUN_HERE
            for dtype in BOUND
            if (kernel, dtype) != ("chunked", jnp.float32)
        ),
    ],
)
def test_text_and_image_tokens(kernel, dtype):
    """512 of text, 257 of an image, 514 of two."""
    plan = AttentionPlan("ulysses_ring", kernel, 2, 2, reference.HEADS)
    crossed = [(13, 512, True), (13, 257, False), (13, 514, True)]
    check(plan, placement(1, 2, 2), crossed, BOUND[dtype], dtype)


@pytest.mark.parametrize(("ring", "ulysses", "direction"), [(4, 1, "one_way"), (4, 2, "two_way")])
def test_each_examples_mask_goes_around_with_its_keys(ring, ulysses, direction):
    """Every key of a sequence with padding, each alone in the mask of one example: the output is that key's value."""
    tokens = 21
    plan = AttentionPlan("ulysses_ring", "chunked", ring, ulysses, reference.HEADS, ring_direction=direction)
    q, k, v, _ = reference.inputs(tokens, batch=tokens)
    with parallel.use(placement(1, ring, ulysses)):
        out = jax.jit(lambda *a: self_attention(plan, *a))(q, k, v, jnp.eye(tokens, dtype=bool))
    alone = v[jnp.arange(tokens), jnp.arange(tokens)]
    assert jnp.abs(out - alone[:, None]).max() < 1e-6


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


@st.composite
def modes(draw, kernels, sizes):
    data, ring, ulysses = draw(st.sampled_from(sizes))
    heads = reference.HEADS // ulysses
    options = {
        "chunks": draw(st.sampled_from([c for c in (1, 2, 4) if heads % c == 0])) if ulysses > 1 else 1,
        "ring_direction": draw(st.sampled_from(["one_way", "two_way"])) if ring > 1 else "one_way",
    }
    plan = AttentionPlan("ulysses_ring", draw(st.sampled_from(kernels)), ring, ulysses, reference.HEADS, **options)
    return plan, (data, ring, ulysses)


TOKENS_AND_KEYS = {"tokens": st.integers(1, 40), "keys": st.none() | st.integers(1, 20), "masked": st.booleans()}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(mode=modes(["dot_product", "chunked"], [(1, 2, 2), (1, 3, 1), (2, 1, 2), (1, 1, 4)]), **TOKENS_AND_KEYS)
def test_random_shapes(mode, tokens, keys, masked):
    plan, mesh = mode
    check(plan, placement(*mesh), [(tokens, keys, masked)], BOUND[jnp.float32])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    mode=modes(reference.RUN_HERE, [(1, 2, 2), (1, 3, 1), (2, 1, 4), (1, 5, 1), (1, 4, 2), (2, 2, 2)]),
    dtype=st.sampled_from(list(BOUND)),
    **TOKENS_AND_KEYS,
)
def test_many_random_shapes(mode, dtype, tokens, keys, masked):
    plan, mesh = mode
    check(plan, placement(*mesh), [(tokens, keys, masked)], BOUND[dtype], dtype)
