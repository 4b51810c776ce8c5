"""Several processes, one for each host, as one run: all of them do the same, process 0 alone decides names and writes.

A process that fails in a block that all of them enter (`fail_together`, `on_process_0`) fails all of them, each with an
exit code. One that dies at any other point ends the others as soon as jax misses its heartbeat (100 s).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.hosts import Hosts
from maxdiffusion.runtime.rendezvous import meet

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHUTDOWN_TIMEOUT = 60  # seconds that a process which ends waits for the others to end as well


def start(hosts: Hosts) -> None:
    """Joins the processes of the run, where the config or the launcher's environment says that there are several.

    Call it before jax starts its devices. Does nothing where jax.distributed runs already.

    Raises:
      UserError: the coordinator cannot be reached in time, the processes do not agree on how many they are, one does
        not come, or jax_distributed=on and nobody says who takes part.
    """
    if jax.distributed.is_initialized() or not hosts.join():
        return
    if hosts.address is not None and hosts.count is not None and hosts.index is not None:
        meet(hosts.address, hosts.count, hosts.index, hosts.timeout)
    try:
        jax.distributed.initialize(
            hosts.address,
            hosts.count,
            hosts.index,
            initialization_timeout=hosts.timeout,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"jax.distributed cannot start ({error}); give coordinator_address=HOST:PORT num_processes=N process_id=I "
            "on every host, or jax_distributed=off to run on this host alone."
        ) from error
    log.info("process %d of %d, %d devices", index(), count(), jax.device_count())


def count() -> int:
    """How many processes make this run; does not start the devices where it is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this one is; 0 writes and shows."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def _exchange(text: str) -> list[str]:
    """The texts of all processes."""
    if count() == 1:
        return [text]
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [bytes(row[:size]).decode("utf-8", "surrogatepass") for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A block of each process alone, without devices: if it fails on one of them, it fails on all.

    Raises:
      UserError: another process failed; it says which and why.
    """
    if count() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports = _exchange(json.dumps([index(), None if error is None else str(error) or repr(error)]))
    if error is not None:
        raise error
    for number, report in map(json.loads, reports):
        if report is not None:
            raise UserError(f"process {number} of this run failed: {report}")


def on_process_0(function: Callable[[], T]) -> T:
    """What `function` returns on process 0, which alone calls it, as JSON types; if it fails, it fails on all."""
    if count() == 1:
        return function()
    result = None
    with fail_together():
        if index() == 0:
            result = function()
    told = dict(map(json.loads, _exchange(json.dumps([index(), result]))))
    return told[0]


def check_agree(facts: Mapping[str, Any]) -> None:
    """Compares `facts` (JSON types) of all processes, before any of them compiles what only fits its own.

    Raises:
      UserError: they differ; it names the first keys in which they do. Or this process is one of a slice's, alone.
    """
    if count() == 1 < jax.process_count():
        raise UserError(
            f"this host is one of {jax.process_count()} of a slice, and jax_distributed=off leaves the others out; "
            "write jax_distributed=on and start the command on every host."
        )
    if count() == 1:
        return
    told: dict[int, Mapping[str, Any]] = dict(map(json.loads, _exchange(json.dumps([index(), facts]))))
    differing = [
        f"{key} (process 0: {_short(told[0].get(key))}, process {number}: {_short(other.get(key))})"
        for key in sorted(set().union(*told.values()))
        for number, other in sorted(told.items())
        if other.get(key) != told[0].get(key)
    ]
    if differing:
        raise UserError(
            f"the processes of this run do not agree on {'; '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}; start all of them with the same words."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on the host of every process, wherever its shards lie."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
