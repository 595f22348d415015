"""Where an RBD image is: POOL/IMAGE or POOL/NAMESPACE/IMAGE, as the `rbd` program writes it."""

from __future__ import annotations

import re
from typing import NamedTuple
from uuid import UUID

from backyfs.errors import UsageError

_PART = re.compile(r"[^/@\x00-\x1f\x7f]{1,200}")


class ImageSpec(NamedTuple):
    """An RBD image; `namespace` "" is the pool's default one."""

    pool: str
    namespace: str
    image: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


def image_spec(text: str) -> ImageSpec:
    """The image that `text` names; UsageError when it is no image spec."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(map(_PART.fullmatch, parts)):
        hint = "a snapshot cannot be named here" if "@" in text else ""
        raise UsageError(
            f"{text!r} is no RBD image", hint=hint or "write POOL/IMAGE or POOL/NAMESPACE/IMAGE"
        )
    return ImageSpec(parts[0], parts[1] if len(parts) == 3 else "", parts[-1])


def snapshot_name(repository: UUID, revision: str) -> str:
    """The RBD snapshot that belongs to a revision of a repository."""
    return f"backy-{repository.hex[:8]}-{revision}"
