"""A port on this machine, taken before a model is loaded for it. Standard library only."""

from __future__ import annotations

import socket

from stocklora.cli.console import UserError

HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """A socket that listens on ``port``; 0 takes a free one. Clients that come early wait.

    Raises:
        UserError: the port is taken.
    """
    listener = socket.socket()
    # Else a port that was just closed stays taken for a minute. On Windows the same flag lets two programs share one.
    if not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        # Bound alone, it could be bound again by a second server while the first one loads its model.
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on port {port}: {error.strerror or error}; give another --port, or 0 for a free one"
        ) from None
    return listener
