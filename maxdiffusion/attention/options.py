"""Settings of a local kernel. Imports no jax."""

from __future__ import annotations

import dataclasses

from maxdiffusion.errors import UserError

LANES = 128
SUBLANES = 16  # rows of a bf16 tile


def check_multiple(name: str, size: int | None, unit: int, needed_by: str = "") -> None:
    """Raises a UserError if the size is given and is not a positive multiple of the unit."""
    if size is not None and (size < unit or size % unit):
        near = max(size // unit, 1) * unit
        raise UserError(f"{name}={size} is not a multiple of {unit}{needed_by}; choose {near} or {near + unit}.")


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Settings of a TPU kernel, named as in the config; None leaves the kernel's default.

    Attributes:
      block_q: rows of q per grid step, a multiple of 16; by default as in `block_sizes`, like the next two.
      block_kv: rows of k and v per grid step, a multiple of 128.
      block_kv_compute: rows of k and v per matrix product, a multiple of 128 that divides block_kv.
      use_base2_exp: exponentials to base 2 inside the kernel, which rounds q once more; off by default.
      use_experimental_scheduler: the kernel's alternative order of products and softmax; off by default.
      attention_vmem_limit_kib: vector memory that the kernel may use. Kernels without this option stay within the
        compiler's limit, which `parallel.compiler` sets for each kind of chip.

    Raises:
      UserError: a size that is not a multiple of its unit, or a part that does not divide its block.
    """

    block_q: int | None = None
    block_kv: int | None = None
    block_kv_compute: int | None = None
    use_base2_exp: bool | None = None
    use_experimental_scheduler: bool | None = None
    attention_vmem_limit_kib: int | None = None

    def __post_init__(self) -> None:
        for name, unit in (("block_q", SUBLANES), ("block_kv", LANES), ("block_kv_compute", LANES)):
            check_multiple(name, getattr(self, name), unit)
        block, part, limit = self.block_kv, self.block_kv_compute, self.attention_vmem_limit_kib
        if part is not None and block is None:
            raise UserError(
                f"block_kv_compute={part} is a part of block_kv, which is not given; give block_kv as well."
            )
        if part is not None and block is not None and block % part:
            legal = [str(n) for n in range(LANES, block + 1, LANES) if block % n == 0]
            raise UserError(f"block_kv_compute={part} does not divide block_kv={block}; choose {' or '.join(legal)}.")
        if limit is not None and limit < 1:
            raise UserError(f"attention_vmem_limit_kib={limit} must be 1 or more; the default is 61440.")


DEFAULT = KernelOptions()
