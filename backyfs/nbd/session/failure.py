"""What is said of a range that could not be read or written: to the client, and in the log."""

from __future__ import annotations

import errno
import logging

from backyfs.errors import BackyfsError, Corrupt
from backyfs.nbd.attached import Attached
from backyfs.store.contract import Buffer

log = logging.getLogger(__name__)

_LOGGED_MAX = 20


class Failure(Exception):
    """A range that could not be read or written: errno, words for people, and where it began."""

    def __init__(self, number: int, text: str, offset: int = 0) -> None:
        super().__init__(text)
        self.number, self.text, self.offset = number, text, offset


class Failures:
    """Turns the errors of an export into Failures, and logs the first ones."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._logged = 0
        self._full = False

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes of the export. Failure."""
        try:
            return self._attached.read(offset, length)
        except (BackyfsError, OSError) as exc:
            raise self.of(exc, offset, length) from exc

    def of(self, exc: BaseException | None, offset: int, length: int) -> Failure:
        """What went wrong in a range. Raises what is a bug."""
        if not isinstance(exc, BackyfsError | OSError):
            raise exc or AssertionError("no error")
        self._log(exc, offset)
        text = getattr(exc, "message", "") or str(exc)
        if isinstance(exc, Corrupt):  # it knows better where
            offset = max(offset, min(exc.offset - self._attached.start, offset + length - 1))
        return Failure(errno.EIO, text, offset)

    def of_write(self, exc: BackyfsError | OSError, offset: int) -> Failure:
        """What went wrong when something was written: ENOSPC is told as such."""
        if not isinstance(exc, OSError) or exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            return self.of(exc, offset, 1)
        if not self._full:
            self._full = True
            log.warning("no space for an overlay", {"export": self._name, "why": exc})
        return Failure(errno.ENOSPC, exc.strerror or "no space for overlays")

    def _log(self, exc: BackyfsError | OSError, offset: int) -> None:
        if self._logged < _LOGGED_MAX:
            self._logged += 1
            level = logging.ERROR if isinstance(exc, Corrupt) else logging.WARNING
            values = {"export": self._name, "offset": offset, "why": exc}
            log.log(level, "request failed", values)

    @property
    def _name(self) -> str:
        return self._attached.info.name
