import dataclasses

import jax
import jax.numpy as jnp
import pytest

from maxdiffusion.attention import AttentionPlan, kernels
from maxdiffusion.attention.block_sizes import Blocks, blocks
from maxdiffusion.attention.options import TAKEN, KernelOptions
from maxdiffusion.attention.plan import PLATFORMS
from maxdiffusion.errors import UserError
from tests.attention import reference

EXAMPLES = {
    "block_q": {"block_q": 128},
    "block_kv": {"block_kv": 256},
    "block_kv_compute": {"block_kv": 256, "block_kv_compute": 128},
    "base2_exp": {"base2_exp": True},
    "scheduler": {"scheduler": True},
    "vmem_limit_kib": {"vmem_limit_kib": 65536},
}
PAIRS = [(kernel, option) for kernel in PLATFORMS for option in EXAMPLES]


def test_every_kernel_and_option_is_in_the_tables():
    assert set(TAKEN) == set(PLATFORMS)
    assert set(EXAMPLES) == {field.name for field in dataclasses.fields(KernelOptions)}


@pytest.mark.parametrize(("kernel", "option"), [pair for pair in PAIRS if pair[1] not in TAKEN[pair[0]]])
def test_an_option_that_a_kernel_does_not_take_is_refused(kernel, option):
    with pytest.raises(UserError, match=f"no meaning for the attention kernel {kernel}, which takes "):
        AttentionPlan(kernel=kernel, options=KernelOptions(**EXAMPLES[option]))


@pytest.mark.parametrize(("kernel", "option"), [pair for pair in PAIRS if pair[1] in TAKEN[pair[0]]])
def test_an_option_reaches_its_kernel_and_changes_no_result(kernel, option):
    """That it reaches it is seen in the program, that nothing changes in the output."""
    plan = AttentionPlan(kernel=kernel, options=KernelOptions(**EXAMPLES[option]))
    q, k, v, mask = reference.inputs(140, 300, heads=1)
    programs = [str(jax.make_jaxpr(kernels.local(p))(q, k, v, mask)) for p in (plan, AttentionPlan(kernel=kernel))]
    assert programs[0] != programs[1]
    out, lse = jax.jit(kernels.local(plan))(q, k, v, mask)
    want, want_lse = reference.attention(q, k, v, mask)
    assert reference.error(out, want) < 2e-6
    assert jnp.abs(lse - want_lse).max() < 5e-6


def test_queries_of_our_kernel_lie_along_lanes():
    with pytest.raises(UserError, match=r"no multiple of 128, .* choose 2944 or 3072"):
        AttentionPlan(kernel="flash", options=KernelOptions(block_q=3024))


@pytest.mark.parametrize(
    ("given", "tokens", "keys", "want"),
    [
        ({"block_q": 3024, "block_kv": 2048, "block_kv_compute": 1024}, 18_900, 18_900, Blocks(3024, 2048, 1024)),
        ({"block_q": 3024, "block_kv": 2048, "block_kv_compute": 1024}, 1000, 512, Blocks(1008, 512, 512)),
        ({"block_kv": 1024}, 18_900, 18_900, Blocks(2704, 1024, 512)),
        ({"block_q": 1024}, 18_900, 18_900, Blocks(1024, 1920, 640)),
    ],
)
def test_given_sizes_win_over_the_table(given, tokens, keys, want):
    assert blocks("TPU v6 lite", tokens, keys, KernelOptions(**given)) == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"block_q": 100}, "no multiple of 16; choose 96 or 112"),
        ({"block_q": 0}, "choose 16 or 32"),
        ({"block_kv": 1000}, "no multiple of 128; choose 896 or 1024"),
        ({"block_kv": 1024, "block_kv_compute": 384}, "divide block_kv=1024; choose 128 or 256 or 512 or 1024"),
        ({"block_kv_compute": 512}, "part of block_kv, which is not given"),
        ({"vmem_limit_kib": 0}, "holds nothing"),
    ],
)
def test_sizes_that_do_not_fit(given, words):
    with pytest.raises(UserError, match=words):
        KernelOptions(**given)
