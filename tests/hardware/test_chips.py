"""Names of slices, and what links carry."""

import subprocess
import sys

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.hardware import links
from maxdiffusion.hardware.chips import GENERATIONS, slice_of


@pytest.mark.parametrize(
    ("name", "topology", "devices", "chips", "accelerator"),
    [
        ("v5e-8", "v5e:2x4", 8, 8, "v5litepod-8"),
        ("v6e-1", "v6e:1x1", 1, 1, "v6e-1"),
        ("v6e-16", "v6e:4x4", 16, 16, "v6e-16"),
        ("v5p-8", "v5p:2x2x1", 4, 4, "v5p-8"),
        ("v5p-32", "v5p:2x2x4", 16, 16, "v5p-32"),
        ("v7x-8", "TPU7x:2x2x1", 8, 4, "tpu7x-8"),
        ("tpu7x-16", "TPU7x:2x2x2", 16, 8, "tpu7x-16"),
        ("v6e:4x8", "v6e:4x8", 32, 32, "v6e-32"),
        ("TPU7x:2x2x4", "TPU7x:2x2x4", 32, 16, "tpu7x-32"),
    ],
)
def test_a_name_is_a_topology(name, topology, devices, chips, accelerator):
    found = slice_of(name)
    assert (found.topology, found.devices, found.chips) == (topology, devices, chips)
    assert found.environment["TPU_ACCELERATOR_TYPE"] == accelerator


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "'v9-8' is not a TPU slice; choose one such as v5e-8, .* topology of v5e, v6e, v5p, TPU7x"),
        ("v6e", "'v6e' is not a TPU slice"),
        ("v6e-12", "no slice v6e-12: choose one of v6e-1, v6e-4, v6e-8"),
        ("v6e-2x4", "no slice v6e-2x4"),
        ("v5p-4", "no slice v5p-4: the number counts cores, two on a chip; choose one of v5p-8, v5p-16"),
        ("v6e:3x3", "v6e:3x3 is not a topology of v6e; choose one of v6e:1x1, v6e:2x2, v6e:2x4"),
        ("v5p:2x4", "v5p:2x4 is not a topology of v5p; choose one of v5p:2x2x1"),
    ],
)
def test_no_slice_names_those_that_are(name, message):
    with pytest.raises(UserError, match=message):
        slice_of(name)


def test_collectives_by_hand():
    """100 MB on devices of v6e, whose links carry 100 GB/s, and of TPU7x, two on a chip."""
    v6e, v7x = (GENERATIONS[name].speed for name in ("v6e", "TPU7x"))
    size = 100_000_000
    assert links.all_to_all(size, 4, 4, v6e) == pytest.approx(size / 200e9)
    assert links.all_to_all(size, 8, 8, v6e) == pytest.approx(size / 100e9)
    assert links.all_to_all(size, 2, 1, v7x) == pytest.approx(size / 2 / 600e9)
    # Half of what four devices have crosses one link; so it does in groups of one core of each chip, side by side.
    assert links.all_to_all(size, 4, 2, v7x) == links.all_to_all(size, 2, 2, v7x) == pytest.approx(size / 100e9)
    assert links.permute(size, 4, 2, v7x) == pytest.approx(size / 50e9)
    assert links.permute(size, 2, 1, v7x) == pytest.approx(size / 600e9)
    assert links.all_gather(size, 8, 8, v6e) == pytest.approx(size * 7 / 8 / 200e9)
    # A cube of eight chips has four links across its middle, a plane of eight two.
    v5p = GENERATIONS["v5p"].speed
    assert links.all_to_all(size, 8, 8, v5p) == pytest.approx(links.all_to_all(size, 8, 8, v6e) / 2)
    assert links.all_to_all(size, 1, 1, v6e) == links.permute(size, 1, 1, v6e) == 0


def test_figures_and_predictions_need_no_jax():
    code = "import sys, maxdiffusion.planning.predict; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
