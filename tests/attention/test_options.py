import dataclasses

import jax
import jax.numpy as jnp
import pytest

from maxdiffusion.attention.block_sizes import Blocks, blocks
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from tests.support import attention_reference as reference

EXAMPLES = {
    "block_q": {"block_q": 128},
    "block_kv": {"block_kv": 256},
    "block_kv_compute": {"block_kv": 256, "block_kv_compute": 128},
    "use_base2_exp": {"use_base2_exp": True},
    "use_experimental_scheduler": {"use_experimental_scheduler": True},
    "attention_vmem_limit_kib": {"attention_vmem_limit_kib": 65536},
}
PAIRS = [(kernel, option) for kernel in KERNELS for option in EXAMPLES]


def test_every_option_is_taken_by_a_kernel():
    taken = {option for kernel in KERNELS.values() for option in kernel.options}
    assert set(EXAMPLES) == taken == {field.name for field in dataclasses.fields(KernelOptions)}


@pytest.mark.parametrize(("kernel", "option"), [pair for pair in PAIRS if pair[1] not in KERNELS[pair[0]].options])
def test_an_option_that_a_kernel_does_not_take_is_refused(kernel, option):
    with pytest.raises(UserError, match=f"is not used by the attention kernel {kernel}, which takes "):
        AttentionPlan(kernel=kernel, options=KernelOptions(**EXAMPLES[option]))


@pytest.mark.parametrize(("kernel", "option"), [pair for pair in PAIRS if pair[1] in KERNELS[pair[0]].options])
def test_an_option_reaches_its_kernel_and_changes_no_result(kernel, option):
    """That it reaches it is seen in the program, that nothing changes in the output."""
    plan = AttentionPlan(kernel=kernel, options=KernelOptions(**EXAMPLES[option]))
    q, k, v, mask = reference.inputs(140, 300, heads=1)
    local = KERNELS[kernel].local
    programs = [str(jax.make_jaxpr(run)(q, k, v, mask)) for run in (local(plan.options), local())]
    assert programs[0] != programs[1]
    out, lse = jax.jit(local(plan.options))(q, k, v, mask)
    want, want_lse = reference.attention(q, k, v, mask)
    assert reference.error(out, want) < 2e-6
    assert jnp.abs(lse - want_lse).max() < 5e-6


def test_queries_of_our_kernel_lie_along_lanes():
    with pytest.raises(UserError, match=r"not a multiple of 128, .* choose 2944 or 3072"):
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
        ({"block_q": 100}, "not a multiple of 16; choose 96 or 112"),
        ({"block_q": 0}, "choose 16 or 32"),
        ({"block_kv": 1000}, "not a multiple of 128; choose 896 or 1024"),
        ({"block_kv": 1024, "block_kv_compute": 384}, "divide block_kv=1024; choose 128 or 256 or 512 or 1024"),
        ({"block_kv_compute": 512}, "part of block_kv, which is not given"),
        ({"attention_vmem_limit_kib": 0}, "attention_vmem_limit_kib=0 must be 1 or more"),
    ],
)
def test_sizes_that_do_not_fit(given, words):
    with pytest.raises(UserError, match=words):
        KernelOptions(**given)
