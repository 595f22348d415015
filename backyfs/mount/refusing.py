"""What a tree never allows: to make, remove, rename or mark anything.

Without the mount option `ro` (that is, with scratch views) root gets past the permissions, and the
kernel asks us.
"""

from __future__ import annotations

import errno
from typing import Any, NoReturn

import pyfuse3
from pyfuse3 import FUSEError


async def _refuse(*_: object) -> NoReturn:
    raise FUSEError(errno.EROFS)


_refused: Any = _refuse  # takes the arguments of every operation


class FixedNames(pyfuse3.Operations):
    """Operations on a tree whose names and marks cannot be changed: EROFS."""

    create = mknod = mkdir = symlink = link = _refused
    unlink = rmdir = rename = _refused
    setxattr = removexattr = _refused
