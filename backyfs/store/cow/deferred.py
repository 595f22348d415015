"""The target of a disk, made when the first frame differs, by whoever brings that frame.

A clone of a file in many pieces takes its time (XFS: 20 us an extent, 0.4 s for a 1 GiB image after
five generations of random changes), all of it in the kernel and on one core. Meanwhile others go on
to read and hash: what they want to store waits in memory, and is stored by whoever comes next once
the target is there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from backyfs.store.cow.target import Target

HELD_MAX = 32 << 20
"""Bytes of frames that wait for one target; whoever brings more waits with them.

Of a VM with many disks as many may be cloned at once as there are threads that work.
"""

Action = Callable[[Target], None]


class DeferredTarget:
    """Makes a target once, and does with it what many threads bring."""

    def __init__(self, make: Callable[[], Target]) -> None:
        self._make = make
        self._turn = threading.Condition()
        self._making = False
        self._waiting: deque[Action] = deque()
        self._held = 0
        self._target: Target | None = None
        self._failure: BaseException | None = None

    @property
    def made(self) -> Target | None:
        """The target, None before it is there."""
        return self._target

    @property
    def begun(self) -> bool:
        """Whether it is there or somebody makes it: what it begins with may be settled already."""
        return self._making or self._target is not None

    def apply(self, action: Action, held: int = 0) -> None:
        """Do `action` with the target: now, or in another thread's call when the target is there.

        `held`: the bytes it keeps in memory. Makes the target if nobody did; when that failed, who
        comes later fails for the same reason. What was put off is done when all calls have
        returned; an error of it is raised from the call that ran into it.
        """
        if self._put_off(action, held):
            return
        target = self._target or self._begin()
        action(target)
        while self._waiting:
            try:
                waiting = self._waiting.popleft()
            except IndexError:  # another thread took it
                break
            waiting(target)

    def _put_off(self, action: Action, held: int) -> bool:
        """Whether `action` waits; if it does not and there is no target, the caller makes it."""
        with self._turn:
            self._turn.wait_for(lambda: not self._making or self._held + held <= HELD_MAX)
            if self._failure is not None:
                raise self._failure
            if self._making:
                self._waiting.append(action)
                self._held += held
                return True
            self._making = self._target is None
            return False

    def _begin(self) -> Target:
        try:
            self._target = self._make()
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            with self._turn:
                self._making = False
                self._turn.notify_all()
        return self._target

    def close(self) -> None:
        """Give back the target's descriptors."""
        if self._target is not None:
            self._target.close()
