import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from maxdiffusion.runtime.timing import Clock, host_peak, peak_memory


class Hand:
    """A clock that only moves when told."""

    time = 100.0

    def __call__(self):
        return self.time

    def wait(self, seconds):
        self.time += seconds


@pytest.fixture
def hand():
    return Hand()


def test_phases_add_up_and_the_innermost_counts(hand):
    clock = Clock(hand)
    with clock.phase("load"):
        hand.wait(1)
    hand.wait(50)  # between phases: nobody's
    with clock.phase("denoise"):
        hand.wait(2)
        with clock.phase("compile"):
            hand.wait(4)
        hand.wait(3)
    with clock.phase("load"):
        hand.wait(0.5)
    assert clock.as_dict()["seconds"] == {"load": 1.5, "denoise": 5.0, "compile": 4.0}
    assert clock.as_dict()["total_seconds"] == 10.5


def test_a_phase_that_raises_is_counted(hand):
    clock = Clock(hand)
    with pytest.raises(KeyError), clock.phase("text"):
        hand.wait(1)
        raise KeyError
    with clock.phase("load"):
        hand.wait(2)
    assert clock.as_dict()["seconds"] == {"text": 1.0, "load": 2.0}


def test_steps_leave_out_what_other_phases_took(hand):
    clock = Clock(hand)
    with clock.phase("denoise"):
        for seconds in (1, 2, 3):
            with clock.step():
                if seconds == 1:
                    with clock.phase("compile"):
                        hand.wait(10)
                hand.wait(seconds)
    assert clock.as_dict()["steps"] == {"denoise": [1.0, 2.0, 3.0]}
    assert clock.as_dict()["seconds"] == {"denoise": 6.0, "compile": 10.0}


def test_compilations_are_taken_out_of_the_phase_they_happen_in():
    clock = Clock()
    with clock.compilation(), clock.phase("denoise"):
        with clock.step():
            jax.jit(lambda x: jnp.sort(jnp.sin(x) @ jnp.cos(x)))(jnp.ones((17, 17))).block_until_ready()
        seconds = clock.as_dict()["seconds"]
    assert seconds["compile"] > 0
    assert seconds["denoise"] >= 0
    before = clock.as_dict()["seconds"]["compile"]
    with clock.phase("decode"):  # outside the block nothing listens
        jax.jit(lambda x: jnp.sort(jnp.tan(x)))(jnp.ones(19)).block_until_ready()
    assert clock.as_dict()["seconds"]["compile"] == before


def test_the_table_shows_every_phase(hand):
    clock = Clock(hand)
    with clock.phase("load"):
        hand.wait(1)
    with clock.phase("denoise"):
        for _ in range(4):
            with clock.step():
                hand.wait(0.75)
    table = clock.table().splitlines()
    assert table[0].split() == ["phase", "seconds", "share"]
    assert table[1].split() == ["load", "1.00", "25%"]
    assert table[2].split()[:3] == ["denoise", "3.00", "75%"] and "4 steps, median 0.75 s" in table[2]
    assert table[3].split() == ["total", "4.00"]
    assert "host" in table[4] and "GiB" in table[4]
    assert "not reported" in table[4] or jax.default_backend() != "cpu"


def test_the_record_is_json_and_an_empty_clock_has_a_table(hand):
    assert json.loads(json.dumps(Clock(hand).as_dict()))["seconds"] == {}
    assert "total" in Clock(hand).table()


def test_peak_memory_sees_a_large_array():
    program = (
        "from maxdiffusion.runtime.timing import host_peak; import numpy as np\n"
        "before = host_peak(); big = np.ones(100 * 2**20, np.uint8); del big; print(host_peak() - before)"
    )
    held = bytearray(b"x") * (200 * 2**20)  # a peak of this process is no peak of its child
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 95 * 2**20 < grown < 150 * 2**20
    assert host_peak() > len(held) and peak_memory()["host"] >= host_peak()
