"""Where a server listens: TCP, a unix socket, or what the service manager handed over."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import trio

from backyfs.errors import BackyfsError, UsageError

HOST, PORT = "127.0.0.1", 9000
_BACKLOG = 128
_FIRST_HANDED_OVER = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen: the unix socket `path` if it is given, else TCP."""

    host: str = HOST
    port: int = PORT
    path: Path | None = None


def handed_over() -> list[socket.socket]:
    """The listening sockets a service manager passed to this process; none otherwise.

    UsageError when one of them is no listening stream socket. Later processes do not see them.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    return [_handed_over(fd) for fd in range(_FIRST_HANDED_OVER, _FIRST_HANDED_OVER + int(count))]


def _handed_over(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise UsageError(f"LISTEN_FDS names descriptor {fd}: {exc.strerror}") from exc
    accepting = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not accepting:
        raise UsageError(
            f"LISTEN_FDS names descriptor {fd}, which is no listening stream socket",
            hint="in the .socket unit use ListenStream= and Accept=no",
        )
    return sock


@contextlib.contextmanager
def listening(endpoint: Endpoint) -> Iterator[list[socket.socket]]:
    """Sockets that listen; a unix socket's name goes away at the end. BackyfsError."""
    with contextlib.ExitStack() as stack:
        if endpoint.path is not None:
            sockets = [stack.enter_context(_unix(endpoint.path))]
        else:
            sockets = [stack.enter_context(sock) for sock in _tcp(endpoint)]
        yield sockets


def _tcp(endpoint: Endpoint) -> list[socket.socket]:
    host, port = endpoint.host, endpoint.port
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise BackyfsError(
            f"cannot listen on {where}: {why}", hint="name an address of this host with -H"
        ) from exc
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
        try:
            sockets.append(_bound(family, address))
        except OSError as exc:
            failed = exc
            if exc.errno != errno.EADDRNOTAVAIL and exc.errno != errno.EAFNOSUPPORT:
                break
    if failed is not None and (not sockets or failed.errno == errno.EADDRINUSE):
        for sock in sockets:
            sock.close()
        raise _cannot_listen(where, failed) from failed
    return sockets


def _bound(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(where: str, exc: OSError) -> BackyfsError:
    hint = "name an address of this host with -H"
    if exc.errno == errno.EADDRINUSE:
        hint = "another server runs there; choose another port with -p"
    elif exc.errno == errno.EACCES:
        hint = "ports below 1024 are root's; choose another port with -p"
    return BackyfsError(f"cannot listen on {where}: {exc.strerror}", hint=hint)


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        try:
            _remove_stale(path)
            mask = os.umask(0o177)  # only the user may connect
            try:
                sock.bind(os.fspath(path))
            finally:
                os.umask(mask)
            sock.listen(_BACKLOG)
        except OSError as exc:
            hint = "another server runs there" if exc.errno == errno.EADDRINUSE else ""
            why = exc.strerror or exc
            raise BackyfsError(f"cannot listen on {path}: {why}", hint=hint) from exc
        inode = os.stat(path).st_ino
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone; what else has the name stays, and is in use."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file of that name, which is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            probe.connect(os.fspath(path))
    except ConnectionRefusedError:
        path.unlink()
    except FileNotFoundError:
        return
    else:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def listeners(sockets: list[socket.socket]) -> list[trio.SocketListener]:
    """The same sockets for trio."""
    return [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]


def shown(sock: socket.socket) -> str:
    """Where a socket listens, for people."""
    if sock.family == socket.AF_UNIX:
        return str(sock.getsockname() or "unix socket")
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_exposed(sock: socket.socket) -> bool:
    """Whether others than this host can connect."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
