"""The table of local kernels: what one device computes, between the collectives."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from maxdiffusion.attention.chunked import chunked
from maxdiffusion.attention.dense import dense
from maxdiffusion.attention.splash import jax_splash, tokamax_splash

# (q: b s n d, k: b k n d, v: b k n d, valid: b k or None) -> (out: b s n d, lse: b s n), as `dense` documents.
Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]

# The platforms that run each one are in `plan.PLATFORMS`, which imports no jax.
KERNELS: Mapping[str, Local] = MappingProxyType(
    {"dot_product": dense, "chunked": chunked, "splash": jax_splash, "tokamax_splash": tokamax_splash}
)
