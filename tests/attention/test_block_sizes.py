import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxdiffusion.attention.block_sizes import (
    FLASH,
    FLASH_ELSEWHERE,
    LANES,
    LARGEST,
    SUBLANES,
    blocks,
    flash_blocks,
    span,
)


@given(kind=st.sampled_from([*LARGEST, "TPU v4"]), tokens=st.integers(1, 200_000), keys=st.integers(1, 200_000))
def test_any_length_gets_legal_blocks(kind, tokens, keys):
    sizes = blocks(kind, tokens, keys)
    assert sizes.q % SUBLANES == 0 and sizes.compute % LANES == 0 and sizes.kv % sizes.compute == 0
    largest = LARGEST.get(kind)
    assert largest is None or (sizes.q <= largest.q and sizes.kv <= largest.kv and sizes.compute <= largest.compute)
    assert -tokens % sizes.q < SUBLANES * -(-tokens // sizes.q)
    assert -keys % sizes.kv < sizes.kv


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("tokens", [32_760, 75_600])
@pytest.mark.parametrize("kind", LARGEST)
def test_official_sizes_are_padded_by_little(kind, tokens, ring):
    length = -(-tokens // ring)
    sizes = blocks(kind, length, length)
    padded = (length + -length % sizes.q) * (length + -length % sizes.kv)
    assert padded < 1.03 * length**2


@given(kind=st.sampled_from([*FLASH, "TPU v4"]), tokens=st.integers(1, 200_000), keys=st.integers(1, 200_000))
def test_any_length_gets_legal_blocks_of_our_kernel(kind, tokens, keys):
    sizes = flash_blocks(kind, tokens, keys)
    assert all(size % LANES == 0 for size in (sizes.q, sizes.kv, sizes.compute))
    assert sizes.kv % sizes.compute == 0 == span(sizes) % sizes.compute and span(sizes) <= sizes.kv
    assert sizes.kv <= FLASH.get(kind, FLASH_ELSEWHERE).kv
    assert -tokens % sizes.q < max(2 * LANES, tokens / 4)


@pytest.mark.parametrize("ring", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [32_760, 75_600])
@pytest.mark.parametrize("kind", [*FLASH, "TPU v5 lite"])
def test_our_kernel_works_little_for_the_padding_of_official_sizes(kind, tokens, ring):
    """The kernel skips the parts of a block after the last one with a key."""
    length = -(-tokens // ring)
    sizes = flash_blocks(kind, length, length)
    assert (length + -length % sizes.q) * (length + -length % sizes.compute) < 1.03 * length**2
