"""Long answers that go out while they are read, and those whose bytes the kernel moves."""

from __future__ import annotations

import errno
import os

from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import Channel, Stalled
from backyfs.nbd.protocol.handshake import ProtocolError
from backyfs.nbd.session.failure import Failure, Failures
from backyfs.nbd.session.replies import Replies
from backyfs.nbd.session.rounds import PIECE_BYTES, cut

SENDFILE_BYTES_MIN = 64 << 10
"""What is shorter is read and sent with the other replies."""
_ZEROS = bytes(PIECE_BYTES)
_OF_THE_FILE = (errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE)
"""What sendfile says when it is not the socket that failed."""


class Streaming:
    """One answer at a time; what is held of it is a piece."""

    def __init__(
        self, attached: Attached, channel: Channel, replies: Replies, failures: Failures
    ) -> None:
        self._attached, self._socket = attached, channel.socket
        self._replies, self._form, self._failures = replies, replies.form, failures
        # Only a structured reply can still tell of an error in bytes that the kernel moves.
        by_kernel = replies.form.structured and channel.socket is not None
        self._raw_fd = attached.raw_fd if by_kernel else None

    def by_kernel(self, length: int) -> bool:
        """Whether the kernel should move `length` bytes (`file`)."""
        return self._raw_fd is not None and length >= SENDFILE_BYTES_MIN

    def whole(self, cookie: int, offset: int, length: int) -> None:
        """One part, however long. OSError and Stalled of sending; ProtocolError: close."""
        if self._form.structured:
            self._chunk(cookie, offset, length)
        else:
            self._simple(cookie, offset, length)

    def _chunk(self, cookie: int, offset: int, length: int) -> None:
        """What cannot be read is padding in it, and an error follows."""
        first: Failure | None = None
        self._replies.put(self._form.data(cookie, offset, length, last=False))
        for at, count in cut(offset, length):
            try:
                self._replies.put(self._failures.read(at, count))
            except Failure as failure:
                first = first or failure
                self._replies.put(_ZEROS[:count])
            self._replies.send()
        if first is not None:  # the specification wants one offset for a chunk
            self._put_error(cookie, first)
        self._replies.put(self._form.end(cookie))

    def _simple(self, cookie: int, offset: int, length: int) -> None:
        """The header must know the outcome: so everything is read twice."""
        try:
            for at, count in cut(offset, length):
                self._failures.read(at, count)
        except Failure as failure:
            self._replies.fail(cookie, failure)
            return
        self._replies.put(self._form.data(cookie, offset, length, last=True))
        try:
            for at, count in cut(offset, length):
                self._replies.put(self._failures.read(at, count))
                self._replies.send()
        except Failure as failure:
            # The header promised success: the specification leaves only this.
            raise ProtocolError(f"a read failed when it had begun: {failure.text}") from failure

    def file(self, cookie: int, offset: int, length: int) -> None:
        """One chunk, moved by the kernel; a part it cannot read is padding, and an error."""
        self._replies.put(self._form.data(cookie, offset, length, last=False))
        self._replies.send(more=True)
        at, end = offset, offset + length
        try:
            while at < end:
                at += self._moved(at, end - at)
        except Failure as failure:
            failure.offset = at
            self._pad(end - at)
            self._put_error(cookie, failure)

    def _moved(self, offset: int, length: int) -> int:
        """Bytes that the kernel moved from the image to the client. Failure of the image."""
        assert self._socket is not None
        assert self._raw_fd is not None
        start = self._attached.start + offset
        try:
            count = os.sendfile(self._socket.fileno(), self._raw_fd, start, length)
        except BlockingIOError:
            raise Stalled("the client takes no bytes") from None
        except OSError as exc:
            if exc.errno not in _OF_THE_FILE:
                raise
            raise self._failures.of(exc, offset, 1) from exc
        if not count:
            raise Failure(errno.EIO, "the image is shorter than it was")
        return count

    def _pad(self, length: int) -> None:
        for _, count in cut(0, length):
            self._replies.put(_ZEROS[:count])
            self._replies.send()

    def _put_error(self, cookie: int, failure: Failure) -> None:
        self._replies.traffic.errors += 1
        number, text, offset = failure.number, failure.text, failure.offset
        self._replies.put(self._form.error_at(cookie, number, text, offset))
