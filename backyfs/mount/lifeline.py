"""The socket whose end tells fusermount3 that this process is gone, so that it unmounts.

It looks once whether the mountpoint is dead, and if it is not yet, goes away and leaves the mount
behind. So of a process that is killed /dev/fuse has to be closed first. Linux closes what a dying
process has open in the order of the descriptors' numbers, but lets go of the files in the reverse
one (as of 4.3): the socket needs the lower number. libfuse (3.14) gives it the higher one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def lifeline() -> Iterator[None]:
    """A socket that is opened while entered gets a lower number than all else opened then."""
    before = _sockets()
    number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # until there is a socket for it
    try:
        yield
        opened = _sockets() - before
    except BaseException:
        os.close(number)
        raise
    if not opened:
        os.close(number)
        return
    os.dup2(min(opened), number, inheritable=False)
    os.close(min(opened))


def _sockets() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if _is_socket(int(name))}


def _is_socket(fd: int) -> bool:
    with contextlib.suppress(OSError):  # that of the listing itself is closed by now
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False
