"""What the kernel tells of a process."""

from __future__ import annotations

from pathlib import Path

_HEAP = ("rw-p", "0")
"""How /proc/PID/maps shows one: its mode, and that it is of no file."""


def decoders_of(server: int) -> list[int]:
    """The processes that decode for a server: what its fork server forked."""
    own = Path(f"/proc/{server}/cmdline").read_bytes()
    return [pid for child in _children(server, own) for pid in _children(child, own)]


def _children(pid: int, cmdline: bytes) -> list[int]:
    """Those that were forked: what it runs beside (fusermount3) is none."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == cmdline]


def cpu_ticks(pid: int) -> int:
    """Processor time it took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def private_kib(pid: int) -> int:
    """Memory that it shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def heaps(pid: int) -> int:
    """Those that glibc made for threads, beside the first: each begins at a multiple of 64 MiB."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    starts = [int(at.partition("-")[0], 16) for at, mode, *_, ino in lines if (mode, ino) == _HEAP]
    return sum(not start % (64 << 20) for start in starts)
