"""Files that are not a disk but hold one, in a format of their own (qcow2 and others).

They are backed up as they are. What reads revisions (mount, loop, nbd-server) shows the file, not
the disk in it; whoever names one as a source should hear of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

_MAGIC = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
)
"""What files in a format have at which byte, and its name."""


def warnings(settings: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each such file among the settings of a source of type `file`."""
    for path in settings.get("disks", {"": settings.get("filename")}).values():
        begin = b""
        with contextlib.suppress(OSError), open(path, "rb") as stream:  # the backup will say why
            begin = stream.read(512)
        for at, magic, name in _MAGIC:
            if begin.startswith(magic, at):
                yield (
                    f"{path} is a {name} file: it is backed up as it is; mount, loop and"
                    " nbd-server show that file, not the disk in it"
                )
