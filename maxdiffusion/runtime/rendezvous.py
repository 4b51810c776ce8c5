"""The processes of a run check each other before jax starts, which would abort with a stack trace instead."""

from __future__ import annotations

import contextlib
import socket
import time

from maxdiffusion.errors import UserError


def meet(address: str, count: int, index: int, timeout: int | float) -> None:
    """Report this process to process 0, on the port that jax uses afterwards, and wait for its answer.

    Raises:
      UserError: the coordinator cannot be reached within `timeout` seconds, the processes do not agree on their number,
        or one does not come.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        fault = _receive(int(port), count, deadline, timeout)
    else:
        fault = _report(host.strip("[]"), int(port), f"{index} {count}", deadline)
    if fault:
        raise UserError(fault)


def _report(host: str, port: int, who: str, deadline: float) -> str:
    """Process 0's answer; empty if nothing is wrong."""
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(left, 0.1)) as link:
                link.sendall(f"{who}\n".encode())
                return link.makefile().read()
        except OSError as error:
            if left <= 0:
                raise UserError(
                    f"coordinator_address={host}:{port} cannot be reached ({error.strerror or error}); start process 0 "
                    "there, open the port, or raise initialization_timeout."
                ) from None
        time.sleep(min(0.2, max(left, 0)))


def _receive(port: int, count: int, deadline: float, timeout: int | float) -> str:
    """The fault of the reporting processes, which is also sent to each of them; empty if there is none."""
    links: dict[int, socket.socket] = {}
    fault = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise UserError(
                f"port {port} of coordinator_address cannot be opened here, on process 0 ({error.strerror}); "
                "choose another port, the same on every host."
            ) from None
        while len(links) < count - 1 and not fault:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in links)
                fault = f"of {count} processes, number {missing} did not come within {timeout:g} s; "
                fault += "start one on every host."
                break
            link.settimeout(5)
            try:
                index, others = map(int, link.makefile().readline().split())
            except (OSError, ValueError):  # not of this run, or a process that reconnects
                link.close()
                continue
            if others != count:
                fault = f"process {index} has num_processes={others} and process 0 has {count}; they must agree."
            elif index in links or not 0 < index < count:
                fault = f"two processes have process_id={index}; number them 0 to {count - 1}."
            links[-1 if index in links else index] = link
        for link in links.values():
            with contextlib.suppress(OSError):
                link.sendall(fault.encode())
    return fault


def _listen(port: int) -> socket.socket:
    """On all addresses, of both families where the system has them."""
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
