"""What happened, for people and for grep: one line per event, values as key=value.

    log = logging.getLogger(__name__)
    log.info("revision published", {"revision": record.id, "stored": 4096})

    2026-11-22T10:15:02.123Z 4711 INFO web01 engine.backup revision published revision=… stored=4096

Callers use the standard library's loggers and hand the values over as one mapping; a text that
needs no values works too. Nothing else in the project configures logging. stderr shows warnings
(with `verbose` everything, with `quiet` errors); a log file gets INFO and above, with `verbose`
DEBUG. Where a line came from (the VM) is a context, carried along into trio tasks and threads.

Logging never makes an operation fail: a log file that cannot be written is reported once on
stderr. A file is re-opened when logrotate moved it away. Several processes may append to the same
file: each line is one write.

With BACKYFS_LOG_FORMAT=json in the environment (the option --log-format sets it, and processes a
command starts inherit it), files get one JSON object a line instead: `time`, `pid`, `level`, `vm`,
`logger`, `event`, perhaps `exception`, and the values under their own names.

Where stderr is the systemd journal, it is the log: INFO and above go there, with the priority as
journald wants it (`<6>`) and without what the journal knows by itself, the time and the process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from backyfs.errors import ConfigError

PROGRAM = "backyfs"
VM_LOG = "backy.log"
"""Name of the log file in a VM's directory."""

_MODE = 0o640
_vm: ContextVar[str] = ContextVar("vm", default="-")
_installed: list[logging.Handler] = []


FORMAT_VARIABLE = "BACKYFS_LOG_FORMAT"
FORMATS = ("text", "json")

TOLD = {"told": True}
"""As `extra` of a line: whoever runs the command hears of it anyway, so it is for files only."""


def configure(
    *,
    verbose: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    logfile: Path | None = None,
    service: bool = False,
) -> None:
    """Set up logging for this process, replacing an earlier set-up.

    `as_json` makes the lines on stderr JSON, as the command's warnings are. `service`: somebody
    keeps stderr (a journal), so INFO goes there, too.
    Raises ConfigError when `logfile` (which somebody asked for) cannot be written.
    """
    shut_down()
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger(PROGRAM).setLevel(level)
    in_journal = is_journal(sys.stderr)
    usual = logging.INFO if service or in_journal else logging.WARNING
    shown = logging.DEBUG if verbose else logging.ERROR if quiet else usual
    stderr = _stderr(_Journal() if in_journal else _Told() if as_json else _Brief(), shown)
    if not in_journal:
        stderr.addFilter(lambda record: not _is_told(record))
    _install(stderr)
    if logfile is not None:
        handler = _File(logfile)
        try:
            handler.open()
        except OSError as exc:
            raise ConfigError(
                f"cannot write the log file {logfile}: {exc.strerror}",
                hint="name another one with -l, or none",
            ) from exc
        _install(handler)


def _stderr(formatter: logging.Formatter, level: int) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(formatter)
    return handler


def in_json() -> bool:
    """Whether log files and the journal get JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def is_journal(stream: TextIO) -> bool:
    """Whether a stream leads straight to the systemd journal, which says so in JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def shut_down() -> None:
    """Undo `configure`."""
    while _installed:
        handler = _installed.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _install(handler: logging.Handler) -> None:
    logging.getLogger().addHandler(handler)
    _installed.append(handler)


@contextlib.contextmanager
def about(vm: str, directory: Path | None = None) -> Iterator[None]:
    """Say of all lines within that they are about `vm`; append them to its own log, too.

    `directory` is the VM's directory; None: no log of its own (a reader writes nothing there).
    """
    token = _vm.set(vm)
    handler = _File(directory / VM_LOG, only_vm=vm) if directory is not None else None
    if handler is not None:
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        _vm.reset(token)
        if handler is not None:
            logging.getLogger().removeHandler(handler)
            handler.close()


def text_of(value: object) -> str:
    """One value of a key=value pair: bare where that is unambiguous, else as a JSON string."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and text.isprintable() and not any(char in ' "=' for char in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def one_line(text: str) -> str:
    """Text that cannot pretend to be another line or drive a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _message(record: logging.LogRecord) -> str:
    parts = [one_line(record.getMessage())]
    values: Any = record.args
    if isinstance(values, Mapping):
        parts += [f"{key}={text_of(value)}" for key, value in values.items()]
    return " ".join(parts)


class _Line(logging.Formatter):
    """`TIME PID LEVEL VM WHERE MESSAGE key=value …`; a traceback follows, each line after `| `."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        where = record.name.removeprefix(f"{PROGRAM}.")
        head = f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z {record.process}"
        line = f"{head} {record.levelname} {_vm.get()} {where} {_message(record)}"
        return "\n| ".join([line, *self._traceback(record)])

    def _traceback(self, record: logging.LogRecord) -> list[str]:
        return self.formatException(record.exc_info).splitlines() if record.exc_info else []


class _Brief(_Line):
    """For a terminal: `backyfs: warning: MESSAGE key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        vm = f"{_vm.get()}: " if _vm.get() != "-" else ""
        line = f"{PROGRAM}: {record.levelname.lower()}: {vm}{_message(record)}"
        return "\n| ".join([line, *self._traceback(record)])


class _Told(_Brief):
    """For a program that reads our stderr: one JSON value a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).removeprefix(f"{PROGRAM}: {record.levelname.lower()}: ")
        return json.dumps({"message_type": "warning", "message": text})


class _Json(logging.Formatter):
    """One JSON object a line, for programs that read logs."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        value = {
            "time": f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z",
            "pid": record.process,
            "level": record.levelname.lower(),
            "vm": _vm.get() if _vm.get() != "-" else None,
            "logger": record.name.removeprefix(f"{PROGRAM}."),
            "event": record.getMessage(),
        }
        values: Any = record.args
        if isinstance(values, Mapping):
            value |= {key + "_" * (key in value): item for key, item in values.items()}
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False, default=str)


class _Journal(_Line):
    """`<PRIORITY>VM WHERE MESSAGE key=value …`, the priority on each line of it."""

    def format(self, record: logging.LogRecord) -> str:
        if in_json():
            text = _Json().format(record)
        else:
            where = record.name.removeprefix(f"{PROGRAM}.")
            text = f"{_vm.get()} {where} {_message(record)}"
            text = "\n| ".join([text, *self._traceback(record)])
        return "\n".join(f"<{_priority(record)}>{line}" for line in text.split("\n"))


def _priority(record: logging.LogRecord) -> int:
    """As syslog(3) counts them."""
    levels = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
    return next((number for level, number in levels if record.levelno >= level), 7)


def _warn(text: str, *values: object) -> None:
    """Tell of the log itself, on stderr only, in the form of its other lines; also with `quiet`."""
    record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, values, None)
    for handler in _installed:
        if not isinstance(handler, _File):
            handler.handle(record)


def _is_told(record: logging.LogRecord) -> bool:
    return bool(getattr(record, "told", False))


class _File(logging.Handler):
    """Appends lines to a file, opened at the first one and again after it was moved away.

    With `only_vm`, takes just the lines about that VM.
    """

    def __init__(self, path: Path, *, only_vm: str | None = None) -> None:
        super().__init__()
        self._path, self._only_vm = path, only_vm
        self._fd: int | None = None
        self._failed = False
        self.setFormatter(_Json() if in_json() else _Line())

    def open(self) -> int:
        """The descriptor of the file that has the name now."""
        if self._fd is not None and not self._is_current(self._fd):
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._fd = self._opened()
        return self._fd

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        if self._only_vm is not None:  # its directory may have been filled by somebody else
            flags |= os.O_NOFOLLOW
        try:
            return os.open(self._path, flags, _MODE)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                exc.strerror = "it is a symbolic link"
            raise

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a failure is told once, on stderr, and goes no further."""
        if self._only_vm not in (None, _vm.get()):
            return
        try:
            os.write(self.open(), self.format(record).encode("utf-8", "backslashreplace") + b"\n")
        except OSError as exc:
            if not self._failed and not _is_told(record):
                self._failed = True
                _warn("cannot log to %s: %s", self._path, exc.strerror or exc)

    def close(self) -> None:
        """Close the file; a later line would open it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        super().close()
