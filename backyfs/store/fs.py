"""All file operations of the store, behind one object, so that a test can fail each of them.

`Fs` calls the operating system; tests pass a subclass that fails, or kills the process, at call
number n. Everything here turns ENOSPC and EDQUOT into NoSpace and leaves other errors alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from backyfs.errors import NoSpace
from backyfs.store.contract import Buffer

FICLONE = 0x40049409
_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH = 0x02 | _FALLOC_KEEP_SIZE
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_ALL = 7  # wait before, write, wait after
_IOV_MAX = 1024
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Fs:
    """The system calls the store makes. Stateless; safe from many threads."""

    def call(self, name: str) -> None:
        """Hook before each operation; tests override it to fail or to kill."""

    @contextlib.contextmanager
    def _guard(self, name: str, path: object) -> Iterator[None]:
        try:
            self.call(name)
            yield
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    f"no space left while writing {path}",
                    hint="free space in the store's file system, or run: backyfs purge",
                ) from exc
            if exc.errno == errno.EFBIG:
                exc.strerror = "its file system, or ulimit -f, allows no file of that size"
            if exc.filename is None:  # calls on descriptors do not know it
                exc.filename = str(path)
            raise

    def create(self, path: Path, mode: int = 0o640) -> int:
        """Create and open `path` for reading and writing; it must not exist."""
        with self._guard("create", path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write(self, fd: int, data: Buffer, path: object = "the store") -> None:
        """Write all of `data` at the descriptor's position."""
        with self._guard("write", path):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    def pwrite(self, fd: int, data: Buffer, offset: int, path: object = "the store") -> None:
        """Write all of `data` at `offset`."""
        with self._guard("pwrite", path):
            view = memoryview(data)
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done

    def truncate(self, fd: int, size: int, path: object = "the store") -> None:
        """Set the file's size."""
        with self._guard("truncate", path):
            os.ftruncate(fd, size)

    def punch(self, fd: int, offset: int, length: int, path: object = "the store") -> None:
        """Make a range a hole (reads as zeros); the size stays."""
        with self._guard("punch", path):
            if _libc.fallocate(fd, _FALLOC_PUNCH, offset, length):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Find room for a range beforehand, where the file system can; the size stays.

        OSError: there is none.
        """
        if _libc.fallocate(fd, _FALLOC_KEEP_SIZE, offset, length):
            code = ctypes.get_errno()
            if code in _NO_ROOM:
                raise OSError(code, os.strerror(code))

    def clone(self, source_fd: int, target_fd: int, path: object = "the store") -> None:
        """Make the target share all of the source's blocks (FICLONE)."""
        with self._guard("clone", path):
            fcntl.ioctl(target_fd, FICLONE, source_fd)

    def fsync(self, fd: int, path: object = "the store") -> None:
        """Make the file's bytes and size durable."""
        with self._guard("fsync", path):
            os.fsync(fd)

    def fdatasync(self, fd: int, path: object = "the store") -> None:
        """Make the file's bytes durable."""
        with self._guard("fdatasync", path):
            os.fdatasync(fd)

    def writev(self, fd: int, pieces: Sequence[Buffer], path: object = "the store") -> None:
        """Write all pieces, one after the other, at the descriptor's position."""
        with self._guard("writev", path):
            for start in range(0, len(pieces), _IOV_MAX):
                part = pieces[start : start + _IOV_MAX]
                done = os.writev(fd, part)
                rest = memoryview(b"".join(part))[done:] if done < _total(part) else b""
                while rest:
                    rest = rest[os.write(fd, rest) :]

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Ask the kernel to begin writing a range to the medium; promises nothing."""
        _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def await_writeback(self, fd: int, offset: int, length: int) -> None:
        """Wait until a range's bytes were written to the medium; makes nothing durable."""
        _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_ALL)

    def rename(self, old: Path, new: Path) -> None:
        """Give `old` the name `new`, replacing what was there."""
        with self._guard("rename", new):
            os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        """Give `old` a second name; FileExistsError when `new` is there."""
        with self._guard("link", new):
            os.link(old, new)

    def unlink(self, path: Path) -> None:
        """Remove a name; one that is not there is no error."""
        with self._guard("unlink", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def mkdir(self, path: Path, mode: int = 0o750) -> None:
        """Create a directory; an existing one is no error."""
        with self._guard("mkdir", path), contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        with self._guard("sync_dir", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _sync_names(fd)
            finally:
                os.close(fd)


def _sync_names(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # Not for directories here (VirtualBox, AFS): then all of the file system.
        if _libc.syncfs(fd):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code)) from exc


MEDIUM_ERRORS = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ}
    | {errno.ELOOP, errno.ENXIO, errno.EFBIG}  # something else than our file has its name
)
"""What the system answers when stored bytes cannot be had; all else (too many open files, no
permission) says nothing about them."""

SMALL_MAX = 256 << 20
"""No file that is read whole (a record, a state) is larger; one that says so is damaged."""


def is_medium_error(exc: OSError) -> bool:
    """Whether an error while reading means that the stored bytes are damaged."""
    return exc.errno in MEDIUM_ERRORS


def why_unwritten(exc: OSError | NoSpace) -> str:
    """The system's words for why something could not be written."""
    cause = exc.__cause__ if isinstance(exc, NoSpace) else exc
    return (isinstance(cause, OSError) and cause.strerror) or str(exc)


SYSTEM = Fs()
"""The real operating system."""


class ReadOnly(Fs):
    """Refuses every change, as a read-only file system does."""

    def call(self, name: str) -> None:
        """OSError."""
        raise OSError(errno.EROFS, "only a newer backyfs may write to it")


def temporary(target: Path) -> Path:
    """A name beside `target` that clean-up recognises as unfinished."""
    return target.with_name(f"{target.name}.{os.urandom(4).hex()}.tmp")


def publish(target: Path, data: Buffer, fs: Fs = SYSTEM, mode: int = 0o640) -> None:
    """Make `target` hold `data`, durably: after a crash it is the old file or the new one."""
    prepare(target, data, fs, mode)
    fs.sync_dir(target.parent)


def prepare(target: Path, data: Buffer, fs: Fs = SYSTEM, mode: int = 0o640) -> None:
    """As `publish`, but without the directory's fsync: the caller does one for many files."""
    tmp = temporary(target)
    try:
        fd = fs.create(tmp, mode)
        try:
            fs.write(fd, data, target)
            fs.fsync(fd, target)
        finally:
            os.close(fd)
        fs.rename(tmp, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


def refuse_special(path: Path) -> None:
    """OSError for what is there and no regular file: renaming to /dev/null takes it from all."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "there is something that is no regular file", str(path))


def publish_new(target: Path, data: Buffer, fs: Fs = SYSTEM, mode: int = 0o640) -> bool:
    """Create `target` with `data` if no such name exists; whether it did.

    As O_EXCL does; but without hard links two at once may both have done it, and the last stays.
    """
    tmp = temporary(target)
    try:
        fd = fs.create(tmp, mode)
        try:
            fs.write(fd, data, target)
            fs.fsync(fd, target)
        finally:
            os.close(fd)
        try:
            fs.link(tmp, target)
        except FileExistsError:
            return False
        except OSError:  # vfat, exfat, rclone: each has another error for it
            if is_named(target):
                return False
            fs.rename(tmp, target)
        fs.sync_dir(target.parent)
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(tmp)


def _total(pieces: Sequence[Buffer]) -> int:
    return sum(map(len, pieces))


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Errors of calls on descriptors do not know the file: let them name it."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        raise


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """Exactly `length` bytes at `offset`; EOFError when the file ends before."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    have = len(data)
    while have < length:
        more = os.pread(fd, length - have, offset + have)
        if not more:
            raise EOFError(f"{length} bytes wanted at {offset}, the file ends at {offset + have}")
        parts.append(more)
        have += len(more)
    return b"".join(parts)


def allocated(path: Path) -> int:
    """Bytes of the blocks a file takes on the medium; 0 when it is gone, or its inode damaged."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
    except OSError as exc:
        if not is_medium_error(exc):
            raise
        return 0


def forget_pages(fd: int, offset: int = 0, length: int = 0) -> None:
    """Tell the page cache that a range (default: the file) will not be read again."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def real_path(path: Path) -> Path:
    """Where `path` leads, absolute. A link to itself stays as it is (pathlib: RuntimeError)."""
    return Path(os.path.realpath(path))


def is_named(path: Path) -> bool:
    """Whether the name is there, whatever is behind it and whether or not it can be read."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as exc:
        if not is_medium_error(exc):
            raise
    return True


def open_unlinked(path: Path, flags: int) -> int:
    """A descriptor of what has this name itself, new with mode 0640.

    Whoever filled the directory may have put a symbolic link there, to what is not ours to read or
    to write: that is an error of the medium.
    """
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            exc.strerror = "it is a symbolic link"
        raise


def open_file(path: Path, access: int = os.O_RDONLY) -> int:
    """A descriptor of the file. An error of the medium if something else has its name."""
    # Not waiting makes no difference for files, but for a FIFO.
    fd = open_unlinked(path, access | os.O_NONBLOCK)
    try:
        with naming(path):
            _require_file(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path) -> bytes:
    """The whole of a small file. An error of the medium if it is none, or impossibly large."""
    with naming(path), open(open_file(path), "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > SMALL_MAX:
            raise OSError(errno.EFBIG, f"impossible size of {size} bytes", str(path))
        return stream.read()


def _require_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EUCLEAN, "not a regular file", str(path))
