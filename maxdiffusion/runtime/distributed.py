"""Runs of several processes, one on each host: all compute the same program, process 0 alone chooses names and writes.

An exception inside `fail_together` or `on_process_0` ends all processes, each with an exit code. A process that dies
elsewhere ends the others as soon as jax misses its heartbeat (100 s).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.hosts import Hosts

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHUTDOWN_TIMEOUT = 60  # seconds that a process which ends waits for the others to end as well


def start(hosts: Hosts) -> None:
    """Join the processes of the run where the config or the launcher's environment says that there are several.

    Call it before jax starts its devices. Does nothing where jax.distributed runs already.

    Raises:
      UserError: the coordinator cannot be reached in time, the processes do not agree on their number, one does not
        come, or jax_distributed=on and neither the config nor a launcher says which processes there are.
    """
    if jax.distributed.is_initialized() or not hosts.join():
        return
    if hosts.address is not None and hosts.count is not None and hosts.index is not None:
        from maxdiffusion.runtime.rendezvous import meet

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


def devices() -> Sequence[jax.Device]:
    """The devices of all processes.

    Raises:
      UserError: jax cannot start them.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError, ValueError) as error:  # jax 0.10.2: an assertion where a plugin is absent
        platforms = os.environ.get("JAX_PLATFORMS")
        said = " ".join(str(error).split()) or "it has no such platform here"
        raise UserError(
            f"jax cannot start its devices with JAX_PLATFORMS={platforms or '(not set)'}: {said}. Install '.[cuda13]' "
            "for GPUs or '.[tpu]' for TPUs, or set JAX_PLATFORMS=cpu."
        ) from error


def count() -> int:
    """The number of processes; does not start the devices where it is 1."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The index of this process; 0 writes files and shows progress."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def _exchange(value: Any) -> dict[int, Any]:
    """The value (JSON types) of each process by its index, which need not be the order of its devices."""
    data = np.frombuffer(json.dumps([index(), value]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return dict(json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True))


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Run a block that uses no devices on each process; an exception on one of them ends the block on all.

    Raises:
      UserError: another process failed; the message says which and why.
    """
    if count() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports = _exchange(None if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for number, report in reports.items():
        if report is not None:
            raise UserError(f"process {number} of this run failed: {report}")


def on_process_0(function: Callable[[], T]) -> T:
    """Call `function` on process 0 alone and return its result (JSON types) on all; if it fails, it fails on all."""
    if count() == 1:
        return function()
    result = None
    with fail_together():
        if index() == 0:
            result = function()
    results: dict[int, T] = _exchange(result)
    return results[0]


def largest(values: Sequence[int]) -> list[int]:
    """The largest of each value over all processes; a collective of a few bytes."""
    if count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.asarray(values, np.int32)).max(axis=0).tolist()


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the bytes of all arrays, for `check_agree`."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def check_agree(facts: Mapping[str, Any]) -> None:
    """Compare `facts` (JSON types) of all processes before any of them compiles.

    Raises:
      UserError: they differ; the message names the first differing keys. Or the slice has other hosts, and
        jax_distributed=off leaves them out.
    """
    if count() == 1 < jax.process_count():
        raise UserError(
            f"this host is one of {jax.process_count()} of a slice, and jax_distributed=off leaves the others out; "
            "write jax_distributed=on and start the command on every host."
        )
    if count() == 1:
        return
    by_process = _exchange(dict(facts))
    differing = [
        f"{key} (process 0: {_short(by_process[0].get(key))}, process {number}: {_short(other.get(key))})"
        for key in sorted(set().union(*by_process.values()))
        for number, other in sorted(by_process.items())
        if other.get(key) != by_process[0].get(key)
    ]
    if differing:
        raise UserError(
            f"the processes of this run do not agree on {'; '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}; start all with the same arguments."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def fetch(array: jax.Array) -> np.ndarray:
    """Gather a sharded array into the host memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
