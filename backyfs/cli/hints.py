"""What people who know other backup programs type, and what they mean by it."""

from __future__ import annotations

from collections.abc import Iterable

from backyfs.errors import UsageError

ALIASES = {"list": "status", "tag": "tags"}
"""Other names of commands that do exactly the same."""

_MEANT = {
    "snapshots": "status",
    "log": "status",
    "ls": "status (or mount, to see the files)",
    "info": "status",
    "stats": "usage",
    "du": "usage",
    "billing": "usage",
    "health": "check",
    "metrics": "check --metrics FILE",
    "show": "status",
    "prune": "purge (= expire, then gc)",
    "compact": "gc",
    "clean": "gc",
    "delete": "forget -r SPEC",
    "rm": "forget -r SPEC",
    "extract": "restore -r SPEC TARGET",
    "dump": "restore -r SPEC -",
    "rev-parse": "find -r SPEC",
    "create": "init to make a repository, backup to make a revision",
    "transfer": "copy",
    "sync": "copy",
    "export": "copy, or restore",
    "protect": "tags add -r SPEC 'manual:why' (such a tag never expires)",
    "unprotect": "tags remove -r SPEC 'manual:why'",
    "unmount": "umount",
    "diagnose": "doctor",
    "version": "--version",
}
_NOT_NEEDED = {
    "unlock": "locks go with the process that holds them, so there is nothing to unlock",
    "break-lock": "locks go with the process that holds them, so there is nothing to break",
    "upgrade": "repositories of this program need no upgrade",
}


def unknown_command(name: str, commands: Iterable[str]) -> UsageError:
    """The error for a command that does not exist, with what was probably meant."""
    if name in _NOT_NEEDED:
        return UsageError(f"no command {name!r}: {_NOT_NEEDED[name]}")
    if name in _MEANT:
        return UsageError(f"no command {name!r}", hint=f"did you mean: backyfs {_MEANT[name]}")
    import difflib  # one command in a thousand needs it

    close = difflib.get_close_matches(name, [*commands, *ALIASES], n=1)
    if close:
        return UsageError(f"no command {name!r}", hint=f"did you mean: backyfs {close[0]}")
    return UsageError(f"no command {name!r}", hint="see them with: backyfs --help")
