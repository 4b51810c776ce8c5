"""cuDNN's kernel without a GPU: it lowers for CUDA, and the code around it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from maxdiffusion import parallel
from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.cudnn import cudnn_flash, valid_first
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from tests.support import attention_reference as reference


@pytest.fixture(autouse=True)
def version(monkeypatch):
    """The version of cuDNN, which the lowering reads from the machine."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(attend, *args):
    return jax.jit(attend).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [128, 12])
def test_it_lowers_for_cuda(dim, masked):
    q, k, v, mask = reference.inputs(40, 21, dim=dim, dtype=jnp.bfloat16)
    text = lowered(cudnn_flash, q, k, v, mask if masked else None)
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmax") == 1
    assert f'"mask_type": "{"PADDING" if masked else "NO_MASK"}"' in text.replace("\\22", '"')


def test_ulysses_and_ring_lower_around_it():
    plan = AttentionPlan("ulysses_ring", "cudnn_flash", 2, 2, reference.HEADS)
    mesh = parallel.make_mesh(parallel.Degrees(context=4), ulysses=2, devices=jax.devices()[:4])
    q, *_ = reference.inputs(40, dtype=jnp.bfloat16)
    _, k, v, mask = reference.inputs(40, 21, dtype=jnp.bfloat16)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        text = lowered(lambda *a: (self_attention(plan, q, q, q), cross_attention(plan, *a)), q, k, v, mask)
    assert text.count("@__cudnn$fmhaSoftmax") == 3


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", 3), ("float32", 0)])
def test_what_auto_chooses_on_a_gpu_lowers_for_cuda(dtype, kernels):
    """Tokens that do not divide over the devices, with and without a mask; fp32 takes the portable kernel."""
    plan = AttentionPlan.parse("auto", heads=reference.HEADS, context=4, platform="gpu", dtype=dtype)
    assert plan.kernel == ("cudnn_flash" if kernels else "chunked")
    mesh = parallel.make_mesh(parallel.Degrees(context=4), ulysses=plan.ulysses, devices=jax.devices()[:4])
    q, *_, mask = reference.inputs(37, dtype=dtype)
    _, k, v, few = reference.inputs(37, 21, dtype=dtype)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        text = lowered(
            lambda *a: (self_attention(plan, q, q, q), self_attention(plan, q, q, q, mask), cross_attention(plan, *a)),
            *(q, k, v, few),
        )
    assert text.count("@__cudnn$fmhaSoftmax") == kernels


def test_the_order_of_keys_does_not_matter():
    q, k, v, mask = reference.inputs(9, 21)
    first_k, first_v, count = valid_first(k, v, mask)
    front = jnp.arange(21) < count[:, None]
    for got, want in zip(
        reference.attention(q, first_k, first_v, front), reference.attention(q, k, v, mask), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_fp32_is_refused():
    q, k, v, _ = reference.inputs(9)
    with pytest.raises(UserError, match="takes bfloat16 or float16, not float32"):
        cudnn_flash(q, k, v)
