"""Asks the server in this container whether it is ready: exit status 0, or 1 with why.

Orchestrators run this every few seconds for as long as the container lives, so it
imports almost nothing: an HTTP library would cost twice the processor time.
"""

import os
import socket
import sys

TIMEOUT_S = 1.5  # less than HEALTHCHECK's own, so that the reason gets told


def ask(port: int) -> str:
    """The status line of GET /health/ready."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(b"GET /health/ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return connection.recv(64).split(b"\r\n")[0].decode("ascii", "replace")


if __name__ == "__main__":
    try:
        status = ask(int(os.environ.get("PORT", "8000")))
    except OSError as error:
        sys.exit(f"expected the server to answer /health/ready, found: {error}")
    sys.exit(0 if " 200 " in status else f"expected 200 from /health/ready: {status}")
