"""What XLA is told when it compiles a program for the devices of the current placement."""

from __future__ import annotations

import logging

from maxdiffusion.parallel.placement import current

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
