"""Which store a directory that is made a repository gets."""

from __future__ import annotations

from pathlib import Path

from backyfs.errors import UsageError
from backyfs.store.identity import COW, PACKS
from backyfs.store.layout import Layout


def choose_store(path: Path, wanted: str = "auto") -> str:
    """What `wanted` means in directory `path`; `auto` is cow on btrfs, packs elsewhere.

    Revisions that are there already, whose repository.json was lost, can only be read by the
    store they were made with. UsageError when another one is wanted.
    """
    there = _store_of_revisions(Layout(path))
    if wanted == "auto":
        return there or _usual(path)
    if there and there != wanted:
        raise UsageError(
            f"{path} holds revisions of a store {there}", hint=f"make it with: --store {there}"
        )
    return wanted


def _usual(path: Path) -> str:
    from backyfs.store.cow.reflink import is_btrfs

    return COW if is_btrfs(path) else PACKS


def _store_of_revisions(layout: Layout) -> str:
    """By the files beside the records; "" where there are none."""
    for suffix, store in ((".map", PACKS), (".sum", COW)):
        if any(layout.revisions.glob(f"*{suffix}")):
            return store
    return ""
