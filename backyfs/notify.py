"""Telling systemd how a service is (sd_notify): one datagram per message, nothing if unasked."""

from __future__ import annotations

import contextlib
import os
import socket
import time

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"


def tell(*lines: str) -> None:
    """Send the lines to the service manager, if there is one; whatever fails is not our loss."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(lines).encode(), address)


def reloading() -> None:
    """Say that the configuration is being read again; `READY` ends it."""
    tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def status(text: str) -> None:
    """Say in words how it goes; `systemctl status` shows it."""
    tell(f"STATUS={text}")


def watchdog_s() -> float:
    """How often the manager wants a sign of life, in seconds; 0: never."""
    pid = os.environ.get("WATCHDOG_PID", "")
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(usec) / 1e6
