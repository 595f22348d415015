"""The base directory that a scheduler keeps: the one that was there when it began, and no other."""

from __future__ import annotations

import os
from pathlib import Path

from backyfs.errors import BackyfsError, ConfigError


class Base:
    """The directory at `path`. ConfigError when there is none.

    Its file system may be unmounted while the scheduler runs. What is below the mountpoint then
    is no place for backups: they would fill another disk, and be out of sight afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)

    def require(self) -> None:
        """BackyfsError unless the directory is still the one there was."""
        if _identity(self.path) != self._identity:
            raise BackyfsError(
                f"{self.path} is another directory than when the scheduler started:"
                " mount its file system again, or restart the scheduler"
            )


def _identity(path: Path) -> tuple[int, int]:
    """What the kernel tells directories by. ConfigError, BackyfsError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"the base directory {path} does not exist",
            hint="make it (or mount what belongs there), or set global: base-dir",
        ) from None
    except OSError as exc:
        raise BackyfsError(f"cannot look at {path}: {exc.strerror}") from exc
    return status.st_dev, status.st_ino
