"""Standard streams that whoever started us has closed (`2>&-`, some service managers).

Their descriptors must not stay free: the next file opened would get the number 1 or 2, and what
is meant for the operator would be written into a repository. Closed stdin is empty, what goes to a
closed stderr is lost, and writing to a closed stdout is an error, as it is for other programs.
"""

from __future__ import annotations

import os
import sys

_STAND_INS = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)  # stdout: every write is EBADF


def restore_closed() -> None:
    """Open the standard descriptors that are closed, and their `sys` streams."""
    for number, flags in enumerate(_STAND_INS):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free one: this one
            assert opened == number
            os.set_inheritable(number, True)
    # Python made None of those that were closed when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
