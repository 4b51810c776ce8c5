import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxdiffusion.attention.block_sizes import FLASH, LANES, LARGEST, SUBLANES, blocks, flash_blocks


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
    assert all(size % LANES == 0 for size in (sizes.q, sizes.kv, sizes.compute)) and sizes.compute <= sizes.kv
    assert -tokens % sizes.q < max(2 * LANES, tokens / 4) and -keys % sizes.kv < max(2 * LANES, keys / 4)


@pytest.mark.parametrize("ring", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [32_760, 75_600])
@pytest.mark.parametrize("kind", [*FLASH, "TPU v5 lite"])
def test_our_kernel_pads_official_sizes_by_little(kind, tokens, ring):
    length = -(-tokens // ring)
    sizes = flash_blocks(kind, length, length)
    assert (length + -length % sizes.q) * (length + -length % sizes.kv) < 1.03 * length**2
