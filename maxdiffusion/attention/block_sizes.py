"""Block sizes of the TPU kernels for a device kind and a length; figures and their source: docs/tpu_layouts.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.attention.options import DEFAULT, LANES, SUBLANES, KernelOptions


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of q and of k/v per grid step, and rows of k/v per matrix product."""

    q: int
    kv: int
    compute: int


# The largest sizes that tokamax' kernel compiles with in the default scoped VMEM; not tuned for speed.
LARGEST: Mapping[str, Blocks] = MappingProxyType(
    {"TPU v6 lite": Blocks(2800, 2048, 1024), "TPU7x": Blocks(2560, 2048, 1024)}
)
LARGEST_ELSEWHERE = Blocks(1024, 2048, 512)

# The largest sizes of `kernels.flash` for bf16: `scripts/tpu.py schedule GENERATION`.
FLASH: Mapping[str, Blocks] = MappingProxyType(
    {"TPU v6 lite": Blocks(9472, 8192, 256), "TPU7x": Blocks(9472, 5120, 256)}
)
FLASH_ELSEWHERE = Blocks(4736, 4096, 256)
FLASH_FP32 = Blocks(1024, 1024, 256)  # a product takes six passes, which are unrolled
STRIP = 256  # queries per matrix product: the width of the matrix unit
UNROLLED = 96 * STRIP * 256  # most queries x keys that are unrolled; more take long to compile


def blocks(device_kind: str, tokens: int, keys: int, options: KernelOptions = DEFAULT) -> Blocks:
    """Block sizes of the splash kernels for one device's tokens and keys, which are to be padded to multiples of them.

    They are the largest ones, shrunk by up to a half where that pads less. Sizes in `options` win, shortened to the
    tokens or keys.
    """
    largest = LARGEST.get(device_kind, LARGEST_ELSEWHERE)
    q = _up(-(-tokens // -(-tokens // largest.q)), SUBLANES)
    longest = min(largest.kv, _up(keys, LANES))
    halves = range(_up(-(-longest // 2), LANES), longest + 1, LANES)
    choices = [(kv, _largest_part(kv, largest.compute)) for kv in halves]
    best = max(part for _, part in choices)
    kv, compute = min(
        ((kv, part) for kv, part in choices if 2 * part >= best), key=lambda choice: (-keys % choice[0], -choice[0])
    )
    if options.block_q is not None:
        q = min(options.block_q, _up(tokens, SUBLANES))
    if options.block_kv is not None:
        kv = min(options.block_kv, _up(keys, LANES))
        compute = _largest_part(kv, options.block_kv_compute or compute)
    return Blocks(q, kv, compute)


def flash_blocks(
    device_kind: str, tokens: int, keys: int, options: KernelOptions = DEFAULT, *, fp32: bool = False
) -> Blocks:
    """Block sizes of `kernels.flash` for one device's tokens and keys; the keys are to be padded to a multiple.

    All sizes are multiples of 128, because queries lie along lanes. Sizes in `options` win, shortened to the tokens or
    keys.
    """
    largest = FLASH_FP32 if fp32 else FLASH.get(device_kind, FLASH_ELSEWHERE)
    q = min(options.block_q, _up(tokens, LANES)) if options.block_q else _least_work(tokens, largest.q)
    kv = min(options.block_kv, _up(keys, LANES)) if options.block_kv else _equal_parts(keys, largest)
    return Blocks(q, kv, _largest_part(kv, options.block_kv_compute or largest.compute))


def span(sizes: Blocks) -> int:
    """Keys per round of the unrolled loop of `kernels.flash`; the rest of a block takes rounds of `compute` keys."""
    most = UNROLLED // (_up(sizes.q, STRIP) * sizes.compute)
    return sizes.compute * max(1, min(most, sizes.kv // sizes.compute))


def _equal_parts(keys: int, largest: Blocks) -> int:
    """The size of equally long blocks of keys; in the last one only parts with keys are computed."""
    if keys <= largest.compute:
        return _up(keys, LANES)
    parts = -(-keys // largest.compute)
    blocks = -(-parts * largest.compute // largest.kv)
    return -(-parts // blocks) * largest.compute


def _least_work(length: int, most: int) -> int:
    """The block, at most `most`, with the least padded length, where starting a block costs as much as 128 rows."""
    sizes = range(LANES, min(most, _up(length, LANES)) + 1, LANES)
    return min(sizes, key=lambda size: -(-length // size) * (size + LANES))


def _largest_part(block: int, most: int) -> int:
    """The largest multiple of 128, at most `most`, that divides the block."""
    return max(part for part in range(LANES, min(block, most) + 1, LANES) if block % part == 0)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
