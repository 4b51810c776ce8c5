"""The processes of a run check each other before jax starts, which would abort with a stack trace instead."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time

from maxdiffusion.errors import UserError

_WELL = "all have come"


def meet(address: str, count: int, index: int, timeout: int | float) -> dict[int, socket.socket]:
    """Report this process to process 0, on the port that jax uses afterwards, and wait for its answer.

    Returns the connections that were made, which stay open, by the process at their other end: on process 0 to all
    others, elsewhere to process 0 alone.

    Raises:
      UserError: the coordinator cannot be reached within `timeout` seconds, the processes do not agree on their number,
        or one does not come.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        return _receive(int(port), count, deadline, timeout)
    return {0: _report(host.strip("[]"), int(port), f"{index} {count}", deadline)}


def _report(host: str, port: int, who: str, deadline: float) -> socket.socket:
    """The connection to process 0, once it has answered that all is well; tries again until the deadline.

    A connection that closes without an answer may be that of an earlier run, which is ending.
    """
    while True:
        left = deadline - time.monotonic()
        link = None
        try:
            link = socket.create_connection((host, port), timeout=max(left, 0.1))
            link.sendall(f"{who}\n".encode())
            answer = _line(link)
            if answer == _WELL:
                return link
            link.close()
            if answer:
                raise UserError(answer)
            reason = "it closed the connection without an answer"
        except OSError as error:
            reason = "no answer" if link and isinstance(error, TimeoutError) else error.strerror or str(error)
            if link:
                link.close()
        if left <= 0.2:
            raise UserError(
                f"coordinator_address={host}:{port} cannot be reached ({reason}); start process 0 there, open the "
                "port, or raise initialization_timeout."
            )
        time.sleep(0.2)


def _line(link: socket.socket) -> str:
    """A line, read byte by byte: what follows belongs to whoever takes the connection; empty where it closes."""
    text = b""
    while not text.endswith(b"\n"):
        if not (byte := link.recv(1)):
            return ""
        text += byte
    return text.decode().rstrip()


def _receive(port: int, count: int, deadline: float, timeout: int | float) -> dict[int, socket.socket]:
    """The connections of all other processes, once they have come; each is told whether all is well.

    A connection that says nothing waits beside the others and hinders none.
    """
    links: dict[int, socket.socket] = {}
    refused: list[socket.socket] = []
    fault = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise UserError(
                f"port {port} of coordinator_address cannot be opened here, on process 0 ({error.strerror}); "
                "choose another port, the same on every host."
            ) from None
        waiting = stack.enter_context(selectors.DefaultSelector())
        waiting.register(server, selectors.EVENT_READ)
        while len(links) < count - 1 and not fault:
            ready = waiting.select(max(deadline - time.monotonic(), 0))
            if not ready and time.monotonic() >= deadline:
                missing = ", ".join(str(i) for i in range(1, count) if i not in links)
                fault = f"of {count} processes, number {missing} did not come within {timeout:g} s; "
                fault += "start one on every host."
            for key, _ in ready:
                if key.fileobj is server:
                    waiting.register(server.accept()[0], selectors.EVENT_READ)
                    continue
                link = key.fileobj
                assert isinstance(link, socket.socket)
                waiting.unregister(link)
                try:
                    index, others = map(int, link.recv(64).split())  # a report is one packet
                except (OSError, ValueError):  # not of this run
                    link.close()
                    continue
                if others != count:
                    fault = f"process {index} has num_processes={others} and process 0 has {count}; they must agree."
                elif not 0 < index < count or (index in links and not _closed(links[index])):
                    fault = f"two processes have process_id={index}; number them 0 to {count - 1}."
                if fault:
                    refused.append(link)
                    break
                links[index] = link  # in the place of one that its launcher has started again
                if len(links) == count - 1:  # one that has gone may come again
                    links = {index: link for index, link in links.items() if not _closed(link)}
        for key in list(waiting.get_map().values()):
            if key.fileobj is not server and isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        for link in (*links.values(), *refused):
            with contextlib.suppress(OSError):
                link.sendall(f"{fault or _WELL}\n".encode())
    if not fault:
        return links
    for link in (*links.values(), *refused):
        link.close()
    raise UserError(fault)


def _closed(link: socket.socket) -> bool:
    """Whether the other end has closed a connection that has nothing to say."""
    try:
        return not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(port: int) -> socket.socket:
    """On all addresses, of both families where the system has them."""
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
