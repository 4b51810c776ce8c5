"""How programs are compiled for the devices of the current placement."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from maxdiffusion.parallel.placement import Placement, current

log = logging.getLogger(__name__)

_TPU = {
    # Off: matmuls whose weights are gathered would become loops of small ones, three times as long in all.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Without it no all-to-all lies beside a kernel, whatever ulysses_attention_chunks.
    "xla_tpu_enable_async_all_to_all": "true",
    # 32 MiB by default on v6e and TPU7x, 16 on v5e and v5p; attention with large blocks needs more.
    "xla_tpu_scoped_vmem_limit_kib": "49152",
}


def compiler_options() -> dict[str, str | bool]:
    """Options for `jax.stages.Lowered.compile`; none where the devices are no TPUs."""
    placement = current()
    if placement is None or placement.mesh.devices.flat[0].platform != "tpu":
        return {}
    log.debug("compiler options: %s", ", ".join(f"{name}={value}" for name, value in _TPU.items()))
    return {**_TPU}


def jit(
    function: Callable[..., Any],
    static_argnums: int | tuple[int, ...] = (),
    donate_argnums: int | tuple[int, ...] = (),
    out_shardings: Any = None,
    tpu_level: int | None = None,
) -> Any:
    """`jax.jit` of a function that asks for the current placement: each has its own programs, with its options.

    jax's cache, keyed by the function and the mesh, would not see that the rules have changed. Arguments that a program
    does not use are arguments all the same: they stay in memory, and the compiler's figures count them. `tpu_level` is
    XLA's optimization level, in its own numbers: O0 is 9, O1 19; None leaves it to XLA.
    """
    return _jit(current(), function, static_argnums, donate_argnums, out_shardings, tpu_level)


@functools.lru_cache(maxsize=32)
def _jit(
    placement: Placement | None, function: Callable[..., Any], static: Any, donate: Any, out: Any, level: int | None
) -> Any:
    del placement
    options: dict[str, Any] = compiler_options()
    if options and level is not None:
        options["optimization_level"] = level

    @functools.wraps(function)
    def own(*args: Any) -> Any:
        return function(*args)

    return jax.jit(
        own,
        static_argnums=static,
        donate_argnums=donate,
        out_shardings=out,
        keep_unused=True,
        compiler_options=options or None,
    )
