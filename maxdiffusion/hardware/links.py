"""Seconds of collectives: bytes over the links that they cross; imports no jax.

All of it is modelled: link figures are public ones (`chips`), nothing was timed, and latency is left out. Groups are
compact boxes of neighbouring chips, as `parallel.topology` lays them, none of which wraps around. Cores of a chip share
its links, and all of them communicate at once.
"""

from __future__ import annotations

import math

from maxdiffusion.hardware.chips import DeviceSpeed


def all_to_all(size: int, devices: int, chips: int, speed: DeviceSpeed) -> float:
    """Each of `devices` on `chips` keeps its part of its `size` bytes and sends the rest to the others.

    Half of the bytes of either half of the group cross the middle of the box.
    """
    if chips == 1:
        return _within(size, devices, speed)
    return size * chips * speed.cores / 4 / (_across(chips, speed.sides) * speed.link)


def permute(size: int, devices: int, chips: int, speed: DeviceSpeed) -> float:
    """Every device of a ring sends `size` bytes to its neighbour."""
    if devices == 1:
        return 0.0
    return size / (speed.in_chip if chips == 1 else speed.link / speed.cores)


def all_gather(size: int, devices: int, chips: int, speed: DeviceSpeed) -> float:
    """Each device gathers `size` bytes from all, its own part included; also a reduce-scatter of `size` bytes.

    They come in on two links, which each chip of a box of more than two has.
    """
    if chips == 1:
        return _within(size, devices, speed)
    return size * (devices - 1) / devices * speed.cores / (min(2, chips - 1) * speed.link)


def between_slices(size: int, speed: DeviceSpeed) -> float:
    """Every device sends `size` bytes to another slice."""
    return size / speed.network


def _within(size: int, devices: int, speed: DeviceSpeed) -> float:
    return size * (devices - 1) / devices / speed.in_chip if devices > 1 else 0.0


def _across(chips: int, sides: int) -> int:
    """Links that join the two halves of the most compact box."""
    box = [1] * sides
    while math.prod(box) < chips:
        box[box.index(min(box))] *= 2
    return math.prod(box) // max(box)
