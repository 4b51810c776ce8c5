"""The table of local kernels: what one device computes, between the collectives."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from maxdiffusion.attention.chunked import chunked
from maxdiffusion.attention.cudnn import cudnn_flash
from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.flash import flash
from maxdiffusion.attention.options import TAKEN
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.attention.splash import jax_splash, tokamax_splash

# (q: b s n d, k: b k n d, v: b k n d, valid: b k or None) -> (out: b s n d, lse: b s n), as `dense` documents.
Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]

# The platforms that run each one are in `plan.PLATFORMS`, its options in `options.TAKEN`; neither imports jax. A kernel
# that takes options is a `Local` with the keyword `options`.
KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "dot_product": dense,
        "chunked": chunked,
        "flash": flash,
        "splash": jax_splash,
        "tokamax_splash": tokamax_splash,
        "cudnn_flash": cudnn_flash,
    }
)


def local(plan: AttentionPlan) -> Local:
    """The plan's kernel with its options."""
    kernel = KERNELS[plan.kernel]
    return functools.partial(kernel, options=plan.options) if TAKEN[plan.kernel] else kernel
