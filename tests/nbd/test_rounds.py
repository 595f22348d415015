"""A round whose client goes away: no helper reads of an image that is closed next."""

from __future__ import annotations

import threading
import time
from typing import cast

import pytest

from backyfs.nbd.attached import Attached
from backyfs.nbd.helpers import Helpers
from backyfs.nbd.session.failure import Failures
from backyfs.nbd.session.replies import Replies
from backyfs.nbd.session.rounds import Reading, Round


class Slow:
    """An export that takes its time, and knows who reads."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        self.begun.set()
        time.sleep(0.1)
        self.ended.append(offset)
        return bytes(length)


class Gone:
    """A client that goes away when a helper has begun."""

    form = None

    def __init__(self, export: Slow) -> None:
        self._export = export

    def send(self) -> None:
        assert self._export.begun.wait(30)
        raise BrokenPipeError


def test_nothing_is_read_when_the_client_is_gone() -> None:
    helpers, export = Helpers(1), Slow()
    thread = threading.Thread(target=helpers.run)
    thread.start()
    try:
        attached, replies = cast("Attached", export), cast("Replies", Gone(export))
        round_ = Round(attached, replies, cast("Failures", None), helpers)
        for number in range(8):
            round_.add(number, 1, Reading(number))
        with pytest.raises(BrokenPipeError):
            round_.work()
        assert export.ended == [0]  # the one under way was waited for
        time.sleep(0.3)
        assert export.ended == [0]
    finally:
        helpers.stop()
        thread.join(30)
