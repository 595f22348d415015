"""What glibc's malloc does with large blocks that are freed.

By default a block of megabytes is a mapping of its own, given back when freed, and every new one is
faulted in and zeroed page by page by the kernel: for a backup that moves 2 MiB batches this is a
tenth of all its CPU time (measured: 0.20 of 0.60 s of system time per 1.3 GiB). Programs that move
batches keep freed blocks instead; their number is bounded, and so is what is kept.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT_BYTES_MAX = 128 << 20
GIVEN_BACK_S = 60.0
"""How often a server gives memory back. A look through its heaps takes milliseconds."""
_BLOCK_BYTES_MAX = 32 << 20
_HEAPS = 2


def keep_freed_blocks() -> None:
    """Reuse freed blocks of up to 32 MiB; harmless where the C library knows no mallopt()."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES_MAX)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES_MAX)


def keep_few_heaps() -> None:
    """Have all threads share two heaps, for servers; to be called before there are threads.

    With one for each, up to eight per core, what each thread once needed and freed piles up.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def give_back() -> None:
    """Give the pages of freed blocks back to the system, also those between blocks in use.

    For servers: blocks of many lengths come and go, and what lies between those that stay would
    never be given back.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
