"""What glibc's malloc does with large blocks that are freed.

By default a block of megabytes is a mapping of its own, given back when freed, and every new one is
faulted in and zeroed page by page by the kernel: for a backup that moves 2 MiB batches this is a
tenth of all its CPU time (measured: 0.20 of 0.60 s of system time per 1.3 GiB). Programs that move
batches keep freed blocks instead; their number is bounded, and so is what is kept.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES_MAX = 128 << 20
_BLOCK_BYTES_MAX = 32 << 20


def keep_freed_blocks() -> None:
    """Reuse freed blocks of up to 32 MiB; harmless where the C library knows no mallopt()."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES_MAX)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES_MAX)
