"""One open pack file: its footer, its tables by position, its bytes.

Never mapped into memory: a file that is truncated under us must give an error, not a signal.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from backyfs.errors import Corrupt
from backyfs.store.digest import HASH
from backyfs.store.fs import is_medium_error, open_file, read_exactly
from backyfs.store.header import Header
from backyfs.store.packs import codec
from backyfs.store.packs.table import (
    ENTRY,
    FOOTER_BYTES_MAX,
    FOOTER_MAGIC,
    HEADER_BYTES,
    PACK_HEADER_BYTES,
    PACK_MAGIC,
    TAIL_BYTES,
    Descriptor,
    Entry,
    Footer,
    decode_footer,
    footer_length,
)

_KIND, _BASE_LOW, _BASE_HIGH = 12, 16, 17
"""Where in an entry its kind stands, and the two bytes of its base segment's index."""
PAGE = 1024
"""Table entries that are read and cached together."""
TABLE_CACHE_BYTES_MAX = 32 << 20
_PAGE_OVERHEAD = 272
"""What Python takes for a page besides its bytes; those of small packs have few of them."""
_SCAN_BYTES = 1 << 20
_BLOCK = 4096
_UNREADABLE_MAX = 16
"""Blocks of a pack that may be unreadable while its footer is looked for: each takes seconds."""
_serial = itertools.count()


class Pages:
    """An LRU of table pages for the whole process, bounded in bytes of memory."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max, self._bytes = bytes_max, 0
        self._pages: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> bytes | None:
        with self._lock:
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
            return page

    def put(self, key: tuple[int, int], page: bytes) -> None:
        with self._lock:
            if key not in self._pages:
                self._pages[key] = page
                self._bytes += len(page) + _PAGE_OVERHEAD
            while self._bytes > self.bytes_max:
                _, old = self._pages.popitem(last=False)
                self._bytes -= len(old) + _PAGE_OVERHEAD


_pages = Pages(TABLE_CACHE_BYTES_MAX)


def bound_tables(bytes_max: int) -> None:
    """Keep fewer table pages in this process."""
    _pages.bytes_max = bytes_max


class _Waiting(threading.local):
    refused = False


_waiting = _Waiting()


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Within, this thread reads what the kernel has in memory; else it is a BlockingIOError."""
    _waiting.refused = True
    try:
        yield
    finally:
        _waiting.refused = False


def about_to_wait() -> None:
    """BlockingIOError where this thread must not wait for the medium."""
    if _waiting.refused:
        raise BlockingIOError(errno.EAGAIN, "not in memory")


def _in_memory(fd: int, length: int, offset: int) -> bytes:
    """As `pread` of what is in the page cache. BlockingIOError, also where nothing can tell."""
    data = bytearray(length)
    try:
        done = os.preadv(fd, [data], offset, os.RWF_NOWAIT)
    except OSError:
        done = 0
    if done < length:
        raise BlockingIOError(errno.EAGAIN, "not in memory")
    return bytes(data)


class PackFile:
    """A pack file open for reading; safe from many threads until closed."""

    def __init__(self, path: Path) -> None:
        """Open `path`. FileNotFoundError, Corrupt, Unsupported."""
        self.path = path
        self.serial = next(_serial)
        self.fd = open_file(path)
        try:
            status = os.fstat(self.fd)
            self.inode, self.bytes = (status.st_dev, status.st_ino), status.st_size
            self._failures: list[int] = []
            self._check_header()
            self.footer = self._read_footer()
            self.descriptors = {found.name: found for found in self.footer.segments}
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Close the descriptor; no read may be under way."""
        os.close(self.fd)

    def _check_header(self) -> None:
        # The header's damage costs no data: only an unknown version or feature stops us.
        with contextlib.suppress(Corrupt):
            Header.decode(self._given(HEADER_BYTES, 0), PACK_MAGIC, str(self.path))

    def _read_footer(self) -> Footer:
        with contextlib.suppress(Corrupt, EOFError):
            length = footer_length(self._given(TAIL_BYTES, max(0, self.bytes - TAIL_BYTES)))
            if length and length + TAIL_BYTES <= self.bytes:
                return self._footer_at(self.bytes - TAIL_BYTES - length, length)
        return self._find_footer()

    def _footer_at(self, at: int, length: int) -> Footer:
        return decode_footer(self._given(length, at), self.path.name)

    def _find_footer(self) -> Footer:
        """Look backwards for any intact copy of the footer: the end of the file is damaged.

        Corrupt; OSError where the medium does not give what may be one.
        """
        for start, end in self._windows():
            window = self._given(end - start + len(FOOTER_MAGIC) - 1, start)
            at = len(window)
            while (at := window.rfind(FOOTER_MAGIC, 0, at)) >= 0:
                with contextlib.suppress(Corrupt, UnicodeDecodeError, EOFError):
                    length = int.from_bytes(self._given(4, start + at + 8), "little")
                    if length <= min(self.bytes, FOOTER_BYTES_MAX):
                        return self._footer_at(start + at, length)
        if self._failures:  # it may well be read the next time
            raise OSError(self._failures[0], os.strerror(self._failures[0]))
        raise Corrupt(f"packs/{self.path.name}: its table is damaged or cut off")

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Pieces of the file from its end to its start, but for holes: they may be exabytes."""
        for first, last in reversed(self._data()):
            for end in range(last, first, -_SCAN_BYTES):
                yield max(first, end - _SCAN_BYTES), end

    def _data(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = 0
        with contextlib.suppress(OSError):  # there is nothing but a hole behind `at`
            while at < self.bytes:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
                at = os.lseek(self.fd, start, os.SEEK_HOLE)
                found.append((start, at))
        return found

    def _given(self, length: int, offset: int) -> bytes:
        """As `pread`; blocks that the medium does not give are zeros, if they are few."""
        try:
            return os.pread(self.fd, length, offset)
        except OSError as exc:
            if not is_medium_error(exc):
                raise
        parts, end = [], min(offset + length, self.bytes)
        while offset < end:
            stop = min(offset // _BLOCK * _BLOCK + _BLOCK, end)
            parts.append(self._block(stop - offset, offset))
            offset = stop
        return b"".join(parts)

    def _block(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self.fd, length, offset)
        except OSError as exc:
            self._failures.append(exc.errno or errno.EIO)
            if not is_medium_error(exc) or len(self._failures) > _UNREADABLE_MAX:
                raise
            return bytes(length)

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes of the file, or fewer at its end."""
        # An offset that no file can have is an error of the call, and no word of the file.
        if offset >= self.bytes:
            return b""
        if _waiting.refused:
            return _in_memory(self.fd, length, offset)
        return os.pread(self.fd, length, offset)


class Segment:
    """A segment as one pack file holds it."""

    def __init__(self, pack: PackFile, descriptor: Descriptor) -> None:
        self.pack = pack
        self.name = descriptor.name
        self.count = descriptor.count
        self.root = descriptor.root
        self._at = descriptor
        self._serial = next(_serial)
        self._unreadable: set[int] = set()

    @property
    def cut_off(self) -> bool:
        """Whether the file ended before the segment's columns do when it was opened."""
        at = self._at
        end = max(at.entries_at + self.count * ENTRY.size, at.hashes_at + self.count * HASH)
        return end > self.pack.bytes

    def _page(self, number: int) -> bytes | None:
        """The page with a frame's entry: entries, then hashes.

        None where the medium does not give all of it: what is wanted may be in the rest.
        """
        page = number // PAGE
        count = min(PAGE, self.count - page * PAGE)
        cached = _pages.get((self._serial, page))
        if cached is None and page not in self._unreadable:
            try:
                cached = self._read(self._at.entries_at, ENTRY.size, page * PAGE, count)
                cached += self._read(self._at.hashes_at, HASH, page * PAGE, count)
            except OSError as exc:
                if not is_medium_error(exc):
                    raise
                self._unreadable.add(page)
                return None
            _pages.put((self._serial, page), cached)
        return cached

    def _read(self, column_at: int, size: int, number: int, count: int) -> bytes:
        """A part of a column of the table. Corrupt where the file ends before, OSError."""
        at = column_at + number * size
        try:
            # An offset that no file can have is an error of the call, not the end of the file.
            if at > self.pack.bytes:
                raise EOFError
            if _waiting.refused:
                return _in_memory(self.pack.fd, count * size, at)
            return read_exactly(self.pack.fd, count * size, at)
        except EOFError as exc:
            raise Corrupt(f"packs/{self.pack.path.name}: its table is cut off") from exc

    def _read_alone(self, column_at: int, size: int, number: int, count: int) -> bytes:
        """As `_read`, of a page that cannot be read as a whole. Corrupt."""
        try:
            return self._read(column_at, size, number, count)
        except OSError as exc:
            if not is_medium_error(exc):
                raise
            raise Corrupt(
                f"packs/{self.pack.path.name}: its table cannot be read: {exc.strerror}"
            ) from exc

    def _entries(self, number: int, count: int) -> bytes:
        """Entries of one page as they stand in the file."""
        page = self._page(number)
        if page is None:
            return self._read_alone(self._at.entries_at, ENTRY.size, number, count)
        start = number % PAGE * ENTRY.size
        return page[start : start + count * ENTRY.size]

    def _hashes(self, number: int, count: int) -> bytes:
        """Hashes of one page."""
        page = self._page(number)
        if page is None:
            return self._read_alone(self._at.hashes_at, HASH, number, count)
        start = len(page) // (ENTRY.size + HASH) * ENTRY.size + number % PAGE * HASH
        return page[start : start + count * HASH]

    def entry(self, number: int) -> Entry:
        """The entry of a frame; ValueError for a number the segment does not have."""
        if not 0 <= number < self.count:
            raise ValueError(f"segment {self.name} has no frame {number}")
        return ENTRY.unpack(self._entries(number, 1))

    def stored_bytes(self, entry: Entry) -> int:
        """The stored size in an entry of ours; 0 where it is dead, or damaged beyond belief."""
        offset, size = entry[:2]
        inside = PACK_HEADER_BYTES <= offset <= self.pack.footer.table_at - size
        return size if inside and size <= codec.STORED_BYTES_MAX else 0

    def entries(self, number: int, count: int) -> list[Entry]:
        """Entries of consecutive frames."""
        if number < 0 or number + count > self.count:
            raise ValueError(f"segment {self.name} has no frames {number}+{count}")
        found: list[Entry] = []
        while count:
            n = min(count, PAGE - number % PAGE)
            found += ENTRY.iter_unpack(self._entries(number, n))
            number, count = number + n, count - n
        return found

    def all_entries(self) -> Iterator[Entry]:
        """Every entry in order, a page in memory at a time."""
        for number in range(0, self.count, PAGE):
            yield from self.entries(number, min(PAGE, self.count - number))

    def patches_against(self, wanted: Mapping[int, Collection[int]]) -> Iterator[int]:
        """Numbers of the frames that are patches against one of the wanted ones.

        `wanted`: by index of the base's segment in the footer's names, numbers of bases.
        """
        low = {index & 0xFF for index in wanted}
        for first in range(0, self.count, PAGE):
            entries = self._entries(first, min(PAGE, self.count - first))
            # Most pages are ruled out by one byte of each entry, without taking them apart.
            if low.isdisjoint(entries[_BASE_LOW :: ENTRY.size]):
                continue
            for number, entry in enumerate(ENTRY.iter_unpack(entries), start=first):
                if entry[2] == codec.PATCH and entry[7] in wanted.get(entry[5], ()):
                    yield number

    def bases(self) -> set[str]:
        """Names of the segments that its patches rest on. Corrupt."""
        found: set[tuple[int, int, int]] = set()
        for first in range(0, self.count, PAGE):
            entries = self._entries(first, min(PAGE, self.count - first))
            columns = (entries[at :: ENTRY.size] for at in (_KIND, _BASE_LOW, _BASE_HIGH))
            found.update(zip(*columns, strict=True))
        names = self.pack.footer.names
        wanted = {low | high << 8 for kind, low, high in found if kind == codec.PATCH}
        return {names[index] for index in wanted if index < len(names)}

    def hashes(self, number: int, count: int) -> bytes:
        """Hashes of consecutive frames, 32 bytes each."""
        if number < 0 or number + count > self.count:
            raise ValueError(f"segment {self.name} has no frames {number}+{count}")
        parts = []
        while count:
            n = min(count, PAGE - number % PAGE)
            parts.append(self._hashes(number, n))
            number, count = number + n, count - n
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def base_name(self, index: int) -> str:
        """The name of the segment an entry's base reference means."""
        try:
            return self.pack.footer.names[index]
        except IndexError:
            raise ValueError(f"segment {self.name} refers to an unknown segment") from None
