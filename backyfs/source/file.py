"""Source `file`: disks that are image files or block devices (LVM volumes, loop devices).

An image file whose file system can reflink is backed up from a clone, which nobody can change; any
other is read live, and the engine finds out whether it changed meanwhile. Holes are not
read: the cost follows the data, not the size. Devices are read past the page cache, since a
volume may be written by another host or path, of which that cache knows nothing; so are files on
NFS, CephFS, FUSE and whatever else has no device of its own. Nothing is
ever written, and no lock taken: the image belongs to the VM.

Settings (also of Backy): `filename: PATH` for one disk named "disk", or `disks: {NAME: PATH}`;
`reflink: auto | always | never`; Backy's `cow` is accepted and means nothing here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from backyfs.errors import ConfigError, SourceUnavailable
from backyfs.model import DEFAULT_DISK, Consistency, Extent, is_name
from backyfs.source import changes as change_list
from backyfs.source.contract import Bookmark, Changes
from backyfs.source.readers import DirectReader, FileReader, Reader
from backyfs.source.reflink import NoClone, clone

TYPE = "file"
_LOCAL = {0x9123683E, 0x01021994, 0x2FC12FC1}
"""btrfs, tmpfs, ZFS (statfs(2)): without a device of their own, but of this host alone."""
_SETTINGS = ("filename", "disks", "reflink", "cow")


class Reflink(StrEnum):
    """Whether an image file is cloned first: where it can be and does no harm, always, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class FileSource:
    """The image files or block devices of one VM, by disk name.

    `changes` holds, per disk, what may differ from the parent revision. It is valid for one
    backup only, which is why no setting can name it.
    """

    type = TYPE

    def __init__(
        self,
        paths: Mapping[str, str],
        *,
        reflink: Reflink = Reflink.AUTO,
        changes: Mapping[str, Sequence[Extent]] | None = None,
    ) -> None:
        self._paths = dict(paths)
        self._reflink = reflink
        self._changes = {
            disk: change_list.checked(extents, f"the change list of {disk}")
            for disk, extents in (changes or {}).items()
        }
        if unknown := self._changes.keys() - self._paths.keys():
            raise ConfigError(f"there is a change list for {min(unknown)!r}, which is no disk here")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> FileSource:
        """The source a job's `source` section describes (without `type`); ConfigError."""
        if unknown := settings.keys() - set(_SETTINGS):
            raise ConfigError(
                f"source file: unknown key {min(unknown)!r}",
                hint=f"known are: {', '.join(_SETTINGS)}",
            )
        return cls(_paths(settings), reflink=_reflink(settings.get("reflink", "auto")))

    def disks(self) -> Sequence[str]:
        """Names of the disks; SourceUnavailable unless each is a file or a block device."""
        for path in self._paths.values():
            with _readable(path):
                _check_kind(path, os.stat(path))
        return tuple(self._paths)

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[FileSnapshot]:
        """All disks, opened (and cloned where possible) one right after the other."""
        with contextlib.ExitStack() as opened:
            disks: dict[str, _Disk] = {}
            started = time.monotonic()
            for name, path in self._paths.items():
                disk = self._open(path, since.get(name), self._changes.get(name))
                disks[name] = opened.enter_context(contextlib.closing(disk))
            yield FileSnapshot(MappingProxyType(disks), time.monotonic() - started)

    def _open(self, path: str, since: Bookmark | None, changes: Sequence[Extent] | None) -> _Disk:
        with _readable(path):
            fd = _opened(path)
            try:
                reader, why = self._reader(fd, path)
            except BaseException:
                os.close(fd)
                raise
        disk = _Disk(path, reader, why, since)
        try:
            disk.believe(changes)
        except BaseException:
            disk.close()
            raise
        return disk

    def _reader(self, fd: int, path: str) -> tuple[Reader, str]:
        """Who reads the open `fd`, and why it is no clone ("" = it is); takes the descriptor."""
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            if self._reflink is Reflink.ALWAYS:
                raise SourceUnavailable(f"cannot clone {path}: it is a block device")
            reader = DirectReader(fd)
            if not reader.size:  # a detached loop device, an ejected disk: no shrunk one
                raise SourceUnavailable(
                    f"{path} is a device of 0 bytes", hint="see what is attached to it with: lsblk"
                )
            return reader, "block device"
        if not os.fstat(fd).st_size:  # emptied by mistake: its revisions would replace good ones
            raise SourceUnavailable(
                f"{path} is a file of 0 bytes", hint="no disk is that small: see what emptied it"
            )
        if self._reflink is Reflink.NEVER:
            return _live(fd), "reflink is set to never"
        try:
            cloned = clone(fd, path, careful=self._reflink is Reflink.AUTO)
        except NoClone as exc:
            if self._reflink is Reflink.ALWAYS:
                raise SourceUnavailable(
                    f"cannot clone {path}: {exc}", hint="or set `reflink: auto` to read it live"
                ) from exc
            return _live(fd), str(exc)
        identity = os.fstat(fd)
        os.close(fd)
        return FileReader(cloned, identity), ""


@dataclass(frozen=True, slots=True)
class FileSnapshot:
    """The disks as they were when opened (clones), or as they are while being read."""

    disks: Mapping[str, _Disk]
    spread_s: float
    """Seconds between the first disk's point in time and the last one's."""

    @property
    def consistency(self) -> Consistency:
        """Crash: nobody asked the guest to flush. Torn is for the engine to find."""
        return Consistency.CRASH

    @property
    def frozen(self) -> bool:
        """Whether every disk is a clone."""
        return all(disk.frozen for disk in self.disks.values())

    @property
    def reason(self) -> str:
        """How the bytes were had, for an operator."""
        if self.frozen:
            spread = f", {self.spread_s * 1000:.0f} ms apart" if len(self.disks) > 1 else ""
            return f"reflink clone{spread}"
        live = (f"{name}: {disk.why}" for name, disk in self.disks.items() if disk.why)
        return f"read live ({'; '.join(live)})"

    def published(self) -> None:
        """Nothing to do: no base snapshot is kept."""


class _Disk:
    """One image file or device, open for reading. Safe from many threads until closed."""

    def __init__(self, path: str, reader: Reader, why: str, since: Bookmark | None) -> None:
        self._path, self._reader, self._since = path, reader, since
        self._changes: Changes | None = None
        self.why = why
        """Why this is not a clone; "" = it is one."""
        self.size = reader.size

    @property
    def frozen(self) -> bool:
        """Whether this is a clone, which nobody can change."""
        return not self.why

    @property
    def bookmark(self) -> Bookmark:
        """Information only: neither time nor inode tells what changed inside an image."""
        found = self._reader.identity
        device = stat.S_ISBLK(found.st_mode)
        number = found.st_rdev if device else found.st_dev
        return {
            "path": self._path,
            "kind": "device" if device else "file",
            "size": self.size,
            "device": f"{os.major(number)}:{os.minor(number)}",
            "inode": found.st_ino,
            "mtime_ns": found.st_mtime_ns,
            "clone": self.frozen,
        }

    def believe(self, changes: Sequence[Extent] | None) -> None:
        """Take a change list relative to the parent revision, if that is of the same image."""
        if changes is None:
            return
        checked = change_list.checked(changes, f"the change list of {self._path}", self.size)
        if self._since is None or self._since.get("path") != self._path:
            return
        before = self._since.get("size")
        if type(before) is not int:
            return
        known = [extent for extent in checked if extent.offset < before]
        if self.size > before:  # the parent knows nothing of what has been added
            known = [Extent(e.offset, min(e.end, before) - e.offset) for e in known]
            known.append(Extent(before, self.size - before))
        self._changes = Changes(tuple(known))

    def changed(self) -> Changes | None:
        """The change list that was given, if any; else None: all must be read."""
        return self._changes

    def data(self) -> Iterator[Extent]:
        """Extents that are no holes, found as they are asked for; a second call looks again."""
        position = 0
        while position < self.size:
            start, end = self._next_data(position)
            if start < end:
                yield Extent(start, end - start)
            position = end

    def _next_data(self, position: int) -> tuple[int, int]:
        """Start and end of the first data at or behind `position`; both = size: none."""
        fd = self._reader.fd
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole up to the end of the file
                if os.fstat(fd).st_size < self.size:
                    raise self._shrunk(position) from None
                return self.size, self.size
            # A device, or a file system that cannot tell.
            if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return position, self.size
            raise SourceUnavailable(
                f"cannot list the data of {self._path} from byte {position}: {exc.strerror}"
            ) from exc
        return min(start, self.size), min(end, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; SourceUnavailable when the image ends before or fails."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, +{length}) is outside of {self.size} bytes")
        try:
            data = self._reader.read(offset, length)
            while len(data) < length:
                more = self._reader.read(offset + len(data), length - len(data))
                if not more:
                    raise self._shrunk(offset + len(data))
                data += more
        except OSError as exc:
            raise SourceUnavailable(
                f"cannot read {self._path} at byte {offset} (length {length}): {exc.strerror}",
                hint="see the kernel log for the medium's errors",
            ) from exc
        return data

    def _shrunk(self, offset: int) -> SourceUnavailable:
        end = os.fstat(self._reader.fd).st_size
        what = f"cannot read {self._path} at byte {offset}"
        if end >= self.size:  # a network or FUSE file system that answers with too little
            return SourceUnavailable(
                f"{what}: its file system says that it has {end} bytes, but gives none there",
                hint="see whether its server, and the medium there, are well",
            )
        return SourceUnavailable(
            f"{what}: it ends at byte {end} now, and had {self.size} bytes when the backup started",
            hint="back it up again when nobody is resizing it",
        )

    def close(self) -> None:
        """Give the descriptor back; a clone is gone with it."""
        self._reader.close()


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn an OSError into one line that names the path."""
    try:
        yield
    except OSError as exc:
        raise SourceUnavailable(
            f"cannot read {path}: {exc.strerror}",
            hint="is the path right? it was given to init, or is `source` of the job",
        ) from exc


def _check_kind(path: str, found: os.stat_result) -> None:
    if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a character device",
    }
    kind = kinds.get(stat.S_IFMT(found.st_mode), "something else")
    raise SourceUnavailable(
        f"cannot back up {path}: it is {kind}", hint="name an image file or a block device"
    )


def _opened(path: str) -> int:
    """A read-only descriptor of a file or block device; never waits, not even for a pipe."""
    _check_kind(path, os.stat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        _check_kind(path, found)  # the name may have been given to something else meanwhile
        if stat.S_ISBLK(found.st_mode):
            _bypass_page_cache(fd)
        return fd
    except BaseException:
        os.close(fd)
        raise


def _live(fd: int) -> Reader:
    """Who reads a file that may change. What another host writes on a file system they share, the
    page cache may never hear of: read again, the file would look as if it had not changed.
    """
    local = os.major(os.fstat(fd).st_dev) or _file_system(fd) in _LOCAL
    return FileReader(fd) if local or not _bypass_page_cache(fd) else DirectReader(fd)


def _file_system(fd: int) -> int:
    """The kernel's number for its type, the first word that statfs(2) gives."""
    found = (ctypes.c_ulong * 32)()
    return found[0] if ctypes.CDLL(None).fstatfs(fd, found) == 0 else 0


def _bypass_page_cache(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:  # it is read as any file
        return False
    return True


def _paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """Disk names and absolute paths out of `filename` or `disks`."""
    if ("filename" in settings) == ("disks" in settings):
        raise ConfigError("source file: give either `filename` or `disks`")
    if "filename" in settings:
        return {DEFAULT_DISK: _path("filename", settings["filename"])}
    disks = settings["disks"]
    if not isinstance(disks, Mapping) or not disks:
        raise ConfigError("source file: `disks` must map names of disks to paths")
    for name in disks:
        if not isinstance(name, str) or not is_name(name):
            raise ConfigError(f"source file: {name!r} is no disk name")
    paths = {name: _path(f"disks.{name}", value) for name, value in disks.items()}
    if len(set(paths.values())) < len(paths):
        raise ConfigError("source file: two disks have the same path")
    return paths


def _path(key: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"source file: `{key}` must be the path of an image file or device")
    if not os.path.isabs(value):
        raise ConfigError(
            f"source file: `{key}` must be an absolute path, not {value!r}",
            hint="the scheduler runs in another directory than you",
        )
    return value


def _reflink(value: object) -> Reflink:
    try:
        return Reflink(value)  # type: ignore[arg-type]
    except ValueError as exc:
        raise ConfigError(
            f"source file: `reflink` must be auto, always or never, not {value!r}"
        ) from exc
