"""What can be set of a local kernel, and which kernel takes what; imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.errors import UserError

LANES = 128
SUBLANES = 16  # rows of a bf16 tile


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Settings of a TPU kernel; None is the default of each (block sizes: `block_sizes.blocks`; switches: off).

    Attributes:
      block_q: rows of q that a grid step holds, a multiple of 16.
      block_kv: rows of k and v that a grid step holds, a multiple of 128.
      block_kv_compute: the part of block_kv that one product takes: a multiple of 128 that divides it.
      base2_exp: exponentials to base 2 inside the kernel, which rounds q once more; off by default.
      scheduler: the kernel's alternative order of products and softmax.
      vmem_limit_kib: vector memory that the kernel may use. Kernels that do not take it live within the compiler's
        limit, which is set by LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=N.

    Raises:
      UserError: a size that is no multiple, or does not divide the size that it is a part of.
    """

    block_q: int | None = None
    block_kv: int | None = None
    block_kv_compute: int | None = None
    base2_exp: bool | None = None
    scheduler: bool | None = None
    vmem_limit_kib: int | None = None

    def __post_init__(self) -> None:
        for name, unit in (("block_q", SUBLANES), ("block_kv", LANES), ("block_kv_compute", LANES)):
            size = getattr(self, name)
            if size is not None and (size < unit or size % unit):
                near = max(size // unit, 1) * unit
                raise UserError(f"{name}={size} is no multiple of {unit}; choose {near} or {near + unit}.")
        whole, part = self.block_kv, self.block_kv_compute
        if part is not None and whole is None:
            raise UserError(
                f"block_kv_compute={part} is a part of block_kv, which is not given; give block_kv as well."
            )
        if part is not None and whole is not None and whole % part:
            legal = [str(n) for n in range(LANES, whole + 1, LANES) if whole % n == 0]
            raise UserError(f"block_kv_compute={part} does not divide block_kv={whole}; choose {' or '.join(legal)}.")
        if self.vmem_limit_kib is not None and self.vmem_limit_kib < 1:
            raise UserError(f"A VMEM limit of {self.vmem_limit_kib} KiB holds nothing; the default is 16384 or 32768.")

    def check(self, kernel: str) -> None:
        """Whether the kernel, a key of `TAKEN`, takes all that is set.

        Raises:
          UserError: it does not, or it needs another unit of block_q.
        """
        if kernel == "flash" and self.block_q is not None and self.block_q % LANES:
            near = max(self.block_q // LANES, 1) * LANES
            raise UserError(
                f"block_q={self.block_q} is no multiple of {LANES}, which the attention kernel flash needs; choose "
                f"{near} or {near + LANES}."
            )
        for option, value in dataclasses.asdict(self).items():
            if value is None or option in TAKEN[kernel]:
                continue
            takers = ", ".join(name for name, taken in TAKEN.items() if option in taken)
            takes = ", ".join(map(shown, TAKEN[kernel])) or "no options"
            raise UserError(
                f"{shown(option)}={value} has no meaning for the attention kernel {kernel}, which takes {takes}; "
                f"leave it out{f' or choose a kernel that takes it ({takers})' if takers else ''}."
            )


_BLOCKS = ("block_q", "block_kv", "block_kv_compute")

DEFAULT = KernelOptions()

# Kernel, as in `plan.PLATFORMS` -> the options that reach it.
TAKEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dot_product": (),
        "chunked": (),
        "flash": (*_BLOCKS, "vmem_limit_kib"),
        "splash": _BLOCKS,
        "tokamax_splash": (*_BLOCKS, "base2_exp", "scheduler"),
        "cudnn_flash": (),
    }
)

# Option -> the config's key; the others are entries of its `flash_block_sizes`, under their own names.
_KEYS: Mapping[str, str] = {
    "base2_exp": "use_base2_exp",
    "scheduler": "use_experimental_scheduler",
    "vmem_limit_kib": "attention_vmem_limit_kib",
}


def shown(option: str) -> str:
    """The option's name in a config."""
    return _KEYS.get(option, option)
