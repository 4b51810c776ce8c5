"""Device memory that does not suffice, as an error of the user's."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import jax

from maxdiffusion.errors import UserError


class OutOfMemory(UserError):
    """A phase of the run needs more device memory than there is; its words are those of the phase and of XLA."""

    def __init__(self, phase: str, reason: str) -> None:
        """`phase` is one of the clock's."""
        self.phase = phase
        super().__init__(f"out of device memory in {phase} ({reason})")


@contextlib.contextmanager
def explained(phase: str) -> Iterator[None]:
    """Turns XLA's error within the block into `OutOfMemory`.

    Raises:
      OutOfMemory: XLA could not allocate the arrays of a program, or its compiler found no place for them.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise OutOfMemory(phase, _short(str(error))) from None


def per_device() -> float:
    """Bytes that a device of this host may use; of a CPU device its share of the machine's memory."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    return float(stats.get("bytes_limit", host))


def exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether XLA raised it for lack of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _short(message: str) -> str:
    """The first sentence of XLA's message, bytes in GiB."""
    text = message.partition("RESOURCE_EXHAUSTED:")[2].strip().splitlines()[0]
    text = re.sub(r"(\d+) bytes", lambda found: f"{int(found[1]) / 2**30:.2f} GiB", text)
    return text.rstrip(".")[:200]
