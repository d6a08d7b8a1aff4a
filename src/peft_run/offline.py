"""`--offline`: tell the libraries that use a hub, and forbid connections to all that forget to ask."""

from __future__ import annotations

import os
import sys

from peft_run.errors import UsageError

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# event of the interpreter -> which of its arguments is the address
WATCHED = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
}
LOOPBACK = ("127.", "::1", "localhost")


def go_offline() -> None:
    """From here on this process and its children reach no other machine."""
    for switch in SWITCHES:
        os.environ[switch] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    sys.addaudithook(refuse_connections)


def refuse_connections(event: str, arguments: tuple) -> None:
    """An audit hook. This machine's own addresses stay open: servers and training processes talk through them."""
    position = WATCHED.get(event)
    if position is None:
        return
    address = arguments[position]
    host = address[0] if isinstance(address, tuple) else address
    if host in (None, "", b"") or (isinstance(host, str) and (host.startswith(LOOPBACK) or host.startswith("/"))):
        return
    if isinstance(host, str | bytes):
        raise UsageError("cli.offline", address=host)
