"""The tree as FUSE requests: translates, and nothing else.

Who runs where (docs/mount.md): all handlers are tasks of one trio thread. What is at hand is
answered there; input and output happen in worker threads, one hop per request. State (`_files`,
`_listings`) belongs to the trio thread: between two awaits nothing else changes it.

Invariant: nothing but FUSEError leaves a handler, for any other exception would end the mount.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from backyfs.errors import BackyfsError, Corrupt
from backyfs.hanging import Threads
from backyfs.model import Extent
from backyfs.mount.refusing import FixedNames
from backyfs.reader.cache import ReadAhead
from backyfs.reader.images import ReadableImage, WritableImage
from backyfs.reader.tree import Kind, Node, NoEntry, Opened, Tree
from backyfs.reader.tree.attributes import PREFIX
from backyfs.store.contract import Buffer
from backyfs.store.packs.decoders import PROCESSES

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LASTING_S = 86400.0
"""How long the kernel may keep what never changes."""
FLEETING_S = 1.0
"""How long it may keep what changes when revisions come and go; with the catalog's half second,
a change shows within two seconds."""

INLINE_BYTES_MAX = 128 * 1024
"""Up to this much is decoded in the trio thread: a thread hop would take longer."""
_QUICK_S = 0.002
_RECENT = 8
"""When none of this many small reads was quicker (a cold disk), the next ones are made in threads.
A single slow one says nothing: the machine may be busy."""
READ_AHEAD_BYTES = 16 << 20
"""So far, for what is stored decodes slower than it is read, and a hole costs nothing."""
_PIECE_BYTES = 1 << 20
_PIECES = 8
"""That many are decoded by one thread at one go; then it is another file's turn."""
_AHEAD = PROCESSES
"""Threads that decode ahead, for all files: each mostly waits for a process."""
_READERS = 4
_WRITERS = 2
_CATALOG_READERS = 2
_PASSED_ON = {errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.ESTALE}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REMEMBERED_ERRORS = 1024
_REMEMBERED_FILES = 4096

_MODES = {
    Kind.DIRECTORY: stat.S_IFDIR | 0o555,
    Kind.FILE: stat.S_IFREG | 0o444,
    Kind.LINK: stat.S_IFLNK | 0o777,
}
_WRITABLE_MODE = stat.S_IFREG | 0o600


def _guarded(
    handler: Callable[Concatenate[Handlers, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Handlers, P], Coroutine[Any, Any, T]]:
    """A handler whose every failure becomes an errno for the one who asked."""

    @functools.wraps(handler)
    async def guarded(self: Handlers, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as exc:
            raise FUSEError(self.errno_of(exc, handler.__name__)) from exc

    return guarded


@dataclass(slots=True)
class _File:
    """An open file; `users` counts the handle itself and the work under way for it, `prefetching`
    the tasks that decode ahead.
    """

    number: int
    opened: Opened
    ahead: ReadAhead
    users: int = 1
    prefetching: int = 0

    def release(self) -> None:
        """One user less; the last gives the image back."""
        self.users -= 1
        if not self.users:
            self.opened.close()


class Handlers(FixedNames):
    """The requests of one mount, of `tree`. `nursery` must be set before the first one: it runs the
    read-ahead and ends with the mount.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    nursery: trio.Nursery

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree
        self._files: dict[int, _File] = {}
        self._listings: dict[int, list[tuple[str, Node]]] = {}
        self._numbers = itertools.count(1)
        self._recent_s: deque[float] = deque([0.0], maxlen=_RECENT)
        self._reported: dict[str, None] = {}
        self._changed: dict[int, int] = {}  # by inode, those opened last: Opened.changed_ns
        self._readers, self._writers = Threads(_READERS), Threads(_WRITERS)
        self._ahead, self._catalog = Threads(_AHEAD), Threads(_CATALOG_READERS)
        self.threads = (self._readers, self._writers, self._ahead, self._catalog)
        self._owner = (os.getuid(), os.getgid())

    # Names and attributes

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(await self._ask(self.tree.child, parent_inode, os.fsdecode(name)))

    @_guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._attributes(await self._ask(self.tree.node, inode))
        except NoEntry:
            # Removed, but still open somewhere: an open file keeps working.
            for file in self._files.values():
                if file.opened.node.inode == inode:
                    return self._attributes(file.opened.node)
            raise

    @_guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = await self._ask(self.tree.node, inode)
        if node.kind is not Kind.LINK:
            raise FUSEError(errno.EINVAL)
        return os.fsencode(node.target)

    @_guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        found = await self._ask(self.tree.attributes, inode)
        return [os.fsencode(PREFIX + name) for name in found]

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        key = os.fsdecode(name)
        if not key.startswith("user."):
            # Not ENODATA: `ls -l` asks for ACLs, and stops only when it hears that there are none
            # anywhere. Not ENOSYS: then the kernel never asks for anything again.
            raise FUSEError(errno.EOPNOTSUPP)
        if not key.startswith(PREFIX):
            raise FUSEError(errno.ENODATA)
        value = (await self._ask(self.tree.attributes, inode)).get(key.removeprefix(PREFIX))
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value.encode()

    @_guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        # One listing per open directory: it stays as it was while it is read in parts.
        listing = await self._ask(self.tree.children, inode)
        number = next(self._numbers)
        self._listings[number] = listing
        return number

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        for index in range(start_id, len(listing)):
            name, node = listing[index]
            if not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._attributes(node), index + 1
            ):
                return

    @_guarded
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    @_guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        base = self.tree.catalog.base
        found = await self._catalog.run(os.statvfs, base)
        answer = StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{name}", getattr(found, f"f_{name}"))
        answer.f_namemax = 255
        return answer

    async def _ask(self, question: Callable[..., T], *args: object) -> T:
        """The tree's answer: at once if it is at hand, else from a thread."""
        try:
            return question(*args, wait=False)
        except BlockingIOError:
            return await self._catalog.run(question, *args)

    def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = _WRITABLE_MODE if node.writable else _MODES[node.kind]
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._owner
        entry.st_size = node.size
        entry.st_blocks = -(-node.data // 512)
        entry.st_blksize = 65536
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime_ns
        entry.attr_timeout = LASTING_S if node.lasts else FLEETING_S
        entry.entry_timeout = LASTING_S if node.name_lasts else FLEETING_S
        return entry

    # Files

    @_guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            node = await self._ask(self.tree.node, inode)
            if not node.writable:
                raise FUSEError(errno.EROFS)
            if flags & os.O_TRUNC:
                raise FUSEError(errno.EPERM)
        opened = await self._readers.run(self.tree.open, inode)
        number = next(self._numbers)
        self._files[number] = _File(number, opened, ReadAhead(opened.node.size))
        # What may change is read past the page cache, which would cut it to its former size, or
        # still have what was dropped with an overlay.
        return FileInfo(
            fh=number, keep_cache=self._pages_hold(opened), direct_io=not opened.node.lasts
        )

    def _pages_hold(self, opened: Opened) -> bool:
        """Whether what the kernel has of a file is what would be read now.

        Of a raw image it may have bytes that were bad, and were healed since.
        """
        before = self._changed.pop(opened.node.inode, None)
        if opened.changed_ns:
            self._changed[opened.node.inode] = opened.changed_ns
            if len(self._changed) > _REMEMBERED_FILES:
                del self._changed[next(iter(self._changed))]
        healed = bool(opened.changed_ns) and opened.changed_ns != before
        return opened.node.lasts and not opened.suspect and not healed

    @_guarded
    async def release(self, fh: int) -> None:
        self._files.pop(fh).release()

    @_guarded
    async def read(  # type: ignore[override]  # any buffer will do
        self, fh: int, off: int, size: int
    ) -> Buffer:
        file = self._files[fh]
        image = file.opened.image
        length = min(size, image.size - off)
        if length <= 0:
            return b""
        # Noted before anything is awaited: requests arrive in order, but end in any.
        if file.ahead.note(off, length):
            self._start_prefetch(file)
        data = image.try_read(off, length)
        return await self._decoded(file, off, length) if data is None else data

    def _start_prefetch(self, file: _File) -> None:
        """Begin when half of what was decoded ahead is used."""
        while file.prefetching < _AHEAD:
            extent = file.ahead.due(self._window() // 2, _PIECE_BYTES)
            if extent is None:
                return
            file.prefetching += 1
            file.users += 1
            self.nursery.start_soon(self._prefetch, file, extent)

    async def _decoded(self, file: _File, offset: int, length: int) -> Buffer:
        image = file.opened.image
        if length <= INLINE_BYTES_MAX and min(self._recent_s) < _QUICK_S:
            data = self._timed(image.read_unless_reserved, offset, length)
            if data is not None:
                return data
        file.users += 1
        try:
            return await self._readers.run(self._in_thread, image, offset, length)
        finally:
            file.release()

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self._files[fh]
        view = self._writable(file)
        count = min(len(buf), view.size - off)
        if count <= 0:
            raise FUSEError(errno.ENOSPC)  # as a block device says it
        await self._changing(file, view.write, off, memoryview(buf)[:count])
        return count

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        file = self._files[fh]
        if file.opened.writable is not None:
            await self._changing(file, file.opened.writable.flush)

    def _writable(self, file: _File) -> WritableImage:
        if file.opened.writable is None:
            raise FUSEError(errno.EROFS)
        return file.opened.writable

    async def _changing(self, file: _File, change: Callable[..., None], *args: object) -> None:
        file.users += 1
        try:
            await self._writers.run(change, *args)
        finally:
            file.release()

    @_guarded
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = await self._ask(self.tree.node, inode)
        if not node.writable:
            raise FUSEError(errno.EROFS)
        if not fields.update_size or attr.st_size != node.size:
            raise FUSEError(errno.EPERM)  # it is a disk: neither size nor owner can be changed
        return self._attributes(node)

    def _in_thread(self, image: ReadableImage, offset: int, length: int) -> Buffer:
        if length > INLINE_BYTES_MAX:
            return image.read(offset, length)
        return self._timed(image.read, offset, length)

    def _timed(self, read: Callable[[int, int], T], offset: int, length: int) -> T:
        """Read, and learn how quick small reads are at present."""
        start = time.perf_counter()
        try:
            return read(offset, length)
        finally:
            self._recent_s.append(time.perf_counter() - start)

    async def _prefetch(self, file: _File, extent: Extent) -> None:
        try:
            due: Extent | None = extent
            while due is not None:
                due = await self._ahead.run(self._decode_ahead, file, due)
        except Exception as exc:  # the read that needs it will say so
            log.debug("read-ahead failed", {"why": exc})
        finally:
            file.prefetching -= 1
            file.release()

    def _decode_ahead(self, file: _File, extent: Extent) -> Extent | None:
        """Decode some pieces, in one thread; returns what is due next, if the reader goes on."""
        due: Extent | None = extent
        for _ in range(_PIECES):
            if due is None or file.number not in self._files:
                return None
            file.opened.image.prefetch(due)
            due = file.ahead.due(self._window(), _PIECE_BYTES)
        return due

    def _window(self) -> int:
        """How far to decode ahead; all files together get a quarter of the cache for it."""
        share = self.tree.images.cache.bytes_max // (4 * max(1, len(self._files)))
        return min(READ_AHEAD_BYTES, share)

    # The end

    def close(self) -> None:
        """Give back what is still open; after the last handler ended."""
        for file in self._files.values():
            file.opened.close()
        self._files.clear()

    def errno_of(self, exc: Exception, operation: str) -> int:
        """The errno for a failure; logs what an operator should know, damage once per place."""
        if isinstance(exc, NoEntry):
            return errno.ENOENT
        if isinstance(exc, MemoryError):
            return errno.ENOMEM
        if isinstance(exc, OSError) and exc.errno in _FULL:
            if self._is_news("full"):
                log.warning("no space left for what is written", {"why": exc})
            return errno.ENOSPC
        if isinstance(exc, OSError) and exc.errno in _PASSED_ON:
            log.warning("request failed", {"request": operation, "why": exc})
            return exc.errno
        if not isinstance(exc, BackyfsError | OSError):
            log.error("request failed: a bug", {"request": operation}, exc_info=exc)
        elif self._is_news(str(exc)):
            level = logging.ERROR if isinstance(exc, Corrupt) else logging.WARNING
            log.log(level, "request failed", {"request": operation, "why": exc})
        return errno.EIO

    def _is_news(self, message: str) -> bool:
        if message in self._reported:
            return False
        self._reported[message] = None
        if len(self._reported) > _REMEMBERED_ERRORS:
            del self._reported[next(iter(self._reported))]
        return True
