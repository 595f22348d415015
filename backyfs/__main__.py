"""Where the process begins and ends.

Importing the program takes a tenth of a second; an interrupt in that time ends the process as it
ends any other program, not with a traceback from the middle of an import.

The interpreter's own end takes 25 ms, to free one by one what the kernel frees at once. Whatever
must be cleaned up was, by `with` and `finally`.
"""

from __future__ import annotations

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Run the command line and end the process; returns the exit code where that must be told."""
    from backyfs.cli.main import main as program
    from backyfs.errors import OutputError

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = program()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, OutputError):
        return code  # the interpreter says what is wrong with them
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
