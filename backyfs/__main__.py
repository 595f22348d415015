"""Where the process begins.

Importing the program takes a tenth of a second; an interrupt in that time ends the process as it
ends any other program, not with a traceback from the middle of an import.
"""

from __future__ import annotations

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Run the command line; returns its exit code."""
    from backyfs.cli.main import main as program

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return program()


if __name__ == "__main__":
    sys.exit(main())
