"""Runs of several processes, one on each host: all compute the same program, process 0 alone chooses names and writes.

A UserError inside `fail_together` or `on_process_0` is raised on all processes; `peers` ends them after any other
failure. What they tell each other goes through jax's coordination service, which needs no device and waits for a
process that is late: gloo, the collectives of CPUs, gives up after 30 s.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import peers, rendezvous
from maxdiffusion.runtime.hosts import Hosts

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHUTDOWN_TIMEOUT = 300  # seconds that a process which is done waits for the others to be done as well
_LATE = 60  # seconds after which a line says who is waited for
_TIMEOUT = 7200  # seconds that a process may be late
_TURN = 1000  # milliseconds; between two turns Python hears signals
_LONG = 1000  # characters; longer facts are compared by their digests

_exchanges = itertools.count()


def start(hosts: Hosts) -> None:
    """Join the processes of the run where the config or the launcher's environment says that there are several.

    Call it before jax starts its devices. Does nothing where jax.distributed runs already.

    Raises:
      UserError: the coordinator cannot be reached in time, the processes do not agree on their number, one does not
        come, or jax_distributed=on and neither the config nor a launcher says which processes there are.
    """
    if jax.distributed.is_initialized() or not hosts.join():
        return
    try:
        address, count_, index_, _ = ClusterEnv.auto_detect_unset_distributed_params(
            hosts.address, hosts.count, hosts.index, None, None, hosts.timeout
        )
        if address is not None and count_ is not None and index_ is not None:
            peers.watch(index_, rendezvous.meet(address, count_, index_, hosts.timeout))
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which `stop` answers
        jax.distributed.initialize(
            address,
            count_,
            index_,
            initialization_timeout=hosts.timeout,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"jax.distributed cannot start ({error}); give coordinator_address=HOST:PORT num_processes=N process_id=I "
            "on every host, or jax_distributed=off to run on this host alone."
        ) from error
    found = devices()
    log.info("process %d of %d, %d devices", index(), count(), len(found))


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
    """The value (JSON types) of each process by its index.

    Raises:
      UserError: one has ended, or is hours late.
    """
    number, client = next(_exchanges), global_state.client
    assert client is not None
    client.key_value_set(_key(number, index()), json.dumps(value))
    values = {other: json.loads(_wait(client, number, other)) for other in range(count())}
    if number > 0:
        client.key_value_delete(_key(number - 1, index()))  # whoever is here has read it
    return values


def _key(number: int, process: int) -> str:
    return f"maxdiffusion/{number}/{process}"


def _wait(client: Any, number: int, process: int) -> str:
    """What a process has to say in an exchange."""
    begun, next_line = time.monotonic(), _LATE
    while True:
        gone = peers.has_left(process)
        try:
            found: str = client.blocking_key_value_get(_key(number, process), _TURN)
            return found
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        waited = time.monotonic() - begun
        if gone or waited > _TIMEOUT:
            what = "has ended" if gone else f"has said nothing for {waited:.0f} s"
            raise UserError(f"process {process} of this run {what}, and the others need it; start all again.")
        if waited > next_line:
            log.warning("process %d has not come for %.0f s; this one waits for it", process, waited)
            next_line *= 2


def wait_for_all() -> None:
    """Wait until all processes are here: before a program that none has run, whose collectives begin within 30 s."""
    if count() > 1:
        _exchange(None)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Run a block that uses no devices on each process; a UserError of one of them ends the block on all.

    Raises:
      UserError: another process failed; the message says which and why.
    """
    if count() == 1:
        yield
        return
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    reports = _exchange(None if error is None else str(error))
    if any(reports.values()):
        peers.agreed()
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
    names = _exchange(socket.gethostname())
    by_process = _exchange({key: _compact(value) for key, value in facts.items()})
    differing = [
        f"{key} (process 0: {_short(by_process[0].get(key))}, process {number}: {_short(other.get(key))})"
        for key in sorted(set().union(*by_process.values()))
        for number, other in sorted(by_process.items())
        if other.get(key) != by_process[0].get(key)
    ]
    if differing:
        peers.agreed()
        others = [number for number, other in sorted(by_process.items()) if other != by_process[0]]
        raise UserError(
            f"the processes of this run do not agree on {'; '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}; start all with the same arguments and "
            f"the same files ({', '.join(f'process {number} runs on {names[number]}' for number in (0, *others[:3]))})."
        )


def _compact(value: Any) -> Any:
    """The value, or the beginning and digest of a long one."""
    text = json.dumps(value, ensure_ascii=False)
    return value if len(text) <= _LONG else f"{text[:60]}... {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def fetch(array: jax.Array) -> np.ndarray:
    """Gather a sharded array into the host memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
