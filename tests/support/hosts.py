"""Several processes on this machine, as hosts would run the command."""

import socket


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]
