"""Block sizes of the TPU kernels: per device kind, fitted to the length at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.attention.options import DEFAULT, LANES, SUBLANES, KernelOptions


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of q and of k/v that a grid step holds, and the part of the latter that one product takes."""

    q: int
    kv: int
    compute: int

    def fitted(self, tokens: int, keys: int) -> Blocks:
        """These sizes, shrunk by up to a half where that pads less.

        75,600 tokens on 4 devices are 18,900: seven blocks of 2,704 rows of q (padded by 0.1 %) and ten of 1,920 of k
        (1.6 %), taken 640 at a time.
        """
        count = -(-tokens // self.q)
        q = _up(-(-tokens // count), SUBLANES)
        longest = min(self.kv, _up(keys, LANES))
        halves = range(_up(-(-longest // 2), LANES), longest + 1, LANES)
        choices = [(kv, _largest_part(kv, self.compute)) for kv in halves]
        compute = max(part for _, part in choices)
        fast = [(kv, part) for kv, part in choices if 2 * part >= compute]
        return Blocks(q, *min(fast, key=lambda choice: (-keys % choice[0], -choice[0])))


# Sizes that tokamax' kernel with segments and statistics compiles with in the default scoped VMEM (32 MiB on v6e and
# TPU7x, 16 MiB on v5p and v5e): 2,800 rows of q took 33.6 MiB on TPU7x. They are not tuned for speed.
LARGEST: Mapping[str, Blocks] = MappingProxyType(
    {
        "TPU v6 lite": Blocks(2800, 2048, 1024),
        "TPU7x": Blocks(2560, 2048, 1024),
    }
)
ELSEWHERE = Blocks(1024, 2048, 512)


def blocks(device_kind: str, tokens: int, keys: int, options: KernelOptions = DEFAULT) -> Blocks:
    """The block sizes for one device's tokens and keys; both are to be padded to multiples of them.

    A size that `options` gives is taken as it is, except that none is longer than the tokens or keys at hand.
    """
    sizes = LARGEST.get(device_kind, ELSEWHERE).fitted(tokens, keys)
    q = sizes.q if options.block_q is None else min(options.block_q, _up(tokens, SUBLANES))
    if options.block_kv is None:
        return Blocks(q, sizes.kv, sizes.compute)
    kv = min(options.block_kv, _up(keys, LANES))
    return Blocks(q, kv, _largest_part(kv, options.block_kv_compute or sizes.compute))


# The largest blocks of `kernels.flash` for bf16, by static count: `scripts/tpu.py schedule GENERATION`, on
# 18,900 tokens and keys with masked tail and statistics, TF/s of the whole call, and of a round with a bound | with a
# running maximum; a head dim of 128 allows 612 on v6e and 769 on TPU7x.
#     v6e    4736/6400/256  521, 540 | 509        TPU7x  9472/4864/256  671, 689 | 610
#     v5p    4736/3840/256  416, 425 | 390        v5e    4736/3840/256  178, 182 | 167
# V transposed by XLA, not here, made that 540 on v6e, and of two layers of the 14B model all but kernels and products
# 0.061 s instead of 0.054 (`scripts/tpu.py memory`, data 2 x ulysses 4).
# Many queries make rounds longer, after which the matrix unit idles; many keys cost only memory. Compiling takes 25 to
# 30 s, for TPU7x 70 (one core).
FLASH: Mapping[str, Blocks] = MappingProxyType(
    {
        "TPU v6 lite": Blocks(4736, 8192, 256),
        "TPU7x": Blocks(9472, 5120, 256),
    }
)
FLASH_ELSEWHERE = Blocks(4736, 4096, 256)
STRIP = 256  # queries that one product takes: the width of the matrix unit
UNROLLED = 96 * STRIP * 256  # queries times keys; more takes long to compile
FLASH_FP32 = Blocks(1024, 1024, 256)  # six passes for each product, which are unrolled


def flash_blocks(
    device_kind: str, tokens: int, keys: int, options: KernelOptions = DEFAULT, *, fp32: bool = False
) -> Blocks:
    """The block sizes of `kernels.flash` for one device's tokens and keys; the keys are to be padded to a multiple.

    Queries lie along lanes there, so that all are multiples of 128. A size that `options` gives is taken as it is,
    except that none is longer than the tokens or keys at hand.
    """
    largest = FLASH_FP32 if fp32 else FLASH.get(device_kind, FLASH_ELSEWHERE)
    q = min(options.block_q, _up(tokens, LANES)) if options.block_q else _least_work(tokens, largest.q)
    kv = min(options.block_kv, _up(keys, LANES)) if options.block_kv else _equal_parts(keys, largest)
    return Blocks(q, kv, _largest_part(kv, options.block_kv_compute or largest.compute))


def span(sizes: Blocks) -> int:
    """Keys that a round of the loop in `kernels.flash` takes, unrolled; a part that fills none has one of its own.

    Between two rounds the matrix unit idles for about 290 cycles, of 100 for each 256 queries by 256 keys on v6e.
    """
    most = UNROLLED // (_up(sizes.q, STRIP) * sizes.compute)
    return sizes.compute * max(1, min(most, sizes.kv // sizes.compute))


def _equal_parts(keys: int, largest: Blocks) -> int:
    """The block of keys; of the last one only what holds keys is computed."""
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
    """The largest whole number of lanes, up to `most`, that divides the block."""
    return max(part for part in range(LANES, min(block, most) + 1, LANES) if block % part == 0)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
