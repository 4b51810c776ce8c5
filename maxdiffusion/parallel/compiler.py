"""Compiler options for the devices of the current placement."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from maxdiffusion.parallel.placement import Placement, current, first_device

log = logging.getLogger(__name__)

_TPU = {
    # Off: matmuls with gathered weights would become loops of small ones, which take three times as long.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Without it no all-to-all overlaps with a kernel, whatever ulysses_attention_chunks.
    "xla_tpu_enable_async_all_to_all": "true",
}

# `xla_tpu_scoped_vmem_limit_kib`, vector memory of one operation, by the kind of device; 32 MiB by default on v6e and
# TPU7x, 16 on v5e and v5p. Attention needs more, and products take larger windows: docs/tpu_layouts.md.
_VMEM_KIB = {"TPU v6 lite": 98304, "TPU7x": 57344}
_VMEM_KIB_OF_OTHERS = 49152


def platform() -> str | None:
    """The platform of the current placement's devices: cpu, gpu or tpu; None without a placement."""
    placement = current()
    return None if placement is None else placement.mesh.devices.flat[0].platform


def compiler_options() -> dict[str, str | bool]:
    """Options for `jax.stages.Lowered.compile`; empty on other devices than TPUs."""
    if platform() != "tpu":
        return {}
    vmem = _VMEM_KIB.get(first_device().device_kind, _VMEM_KIB_OF_OTHERS)
    options: dict[str, str | bool] = {**_TPU, "xla_tpu_scoped_vmem_limit_kib": str(vmem)}
    log.debug("compiler options: %s", ", ".join(f"{name}={value}" for name, value in options.items()))
    return options


def jit(function: Callable[..., Any], *, tpu_level: int | None = None, **options: Any) -> Any:
    """`jax.jit(function, **options)` of a function that uses the current placement, with the options of its compiler.

    Each placement has its own programs: jax's cache, keyed by the function and the mesh, would not see that the rules
    have changed. Arguments that a program does not use stay in memory and in the compiler's figures. `tpu_level` is
    XLA's optimization level in its own numbers: O0 is 9, O1 19; None is XLA's default.
    """
    return _jit(current(), function, tpu_level, **options)


@functools.lru_cache(maxsize=32)
def _jit(placement: Placement | None, function: Callable[..., Any], level: int | None, **options: Any) -> Any:
    del placement
    compiler: dict[str, Any] = compiler_options()
    if compiler and level is not None:
        compiler["optimization_level"] = level

    @functools.wraps(function)
    def own(*args: Any) -> Any:
        return function(*args)

    return jax.jit(own, keep_unused=True, compiler_options=compiler or None, **options)
