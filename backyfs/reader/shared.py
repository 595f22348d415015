"""A table of images that are opened once and shared by all who want the same one.

Whoever opens one gets a lease. The image behind it is made by the first; it is closed some time
after the last lease ended, or when room is needed.

Synchronous and safe from many threads; `sweep` must be called about once per second.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """What can be shared."""

    def close(self) -> None:
        """End its use."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Closable)


class _Shared(Generic[V]):
    """An image and how many use it. `ready` is set once it was opened, or could not be."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.image: V | None = None
        self.users = 1
        self.idle_since = 0.0


class Lease(Generic[V]):
    """The right to use an image until `close`, which is harmless when repeated."""

    def __init__(self, image: V, release: Callable[[], None]) -> None:
        self.image = image
        self._release = release
        self._open = threading.Lock()

    def close(self) -> None:
        """Give the image back; never blocks."""
        if self._open.acquire(blocking=False):
            self._release()


class SharedImages(Generic[K, V]):
    """Images by key: at most `images_max`.

    `linger_s` says for how long one is kept when nobody uses it; `expendable` whether it may be
    closed before, when there are too many.
    """

    def __init__(
        self,
        *,
        images_max: int,
        linger_s: Callable[[V], float],
        expendable: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images_max, self._linger_s, self._clock = images_max, linger_s, clock
        self._expendable = expendable
        self._lock = threading.Lock()
        self._table: dict[K, _Shared[V]] = {}
        self._idle: OrderedDict[K, _Shared[V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._table)

    def get(self, key: K) -> V | None:
        """The image of a key if it is open; just to look at."""
        shared = self._table.get(key)
        return shared.image if shared is not None else None

    def open(self, key: K, make: Callable[[], V]) -> Lease[V]:
        """A lease of the image of a key; `make` opens it, and what that raises passes through.

        OSError ENFILE when too many are open.
        """
        while True:
            shared, mine = self._join(key)
            if mine:
                return self._lease(key, shared, self._make(key, shared, make))
            shared.ready.wait()
            if shared.image is not None:
                return self._lease(key, shared, shared.image)

    def _join(self, key: K) -> tuple[_Shared[V], bool]:
        """The entry of a key with one user more, and whether the caller must open its image."""
        with self._lock:
            shared = self._table.get(key)
            if shared is not None:
                shared.users += 1
                self._idle.pop(key, None)
                return shared, False
            surplus = self._make_room()
            shared = self._table[key] = _Shared()
        _close(surplus)
        return shared, True

    def _make_room(self) -> list[_Shared[V]]:
        surplus = []
        while len(self._table) >= self._images_max:
            if not self._idle or not self._expendable:
                raise OSError(errno.ENFILE, f"{len(self._table)} images are open already")
            surplus.append(self._take(next(iter(self._idle))))
        return surplus

    def _take(self, key: K) -> _Shared[V]:
        del self._table[key]
        return self._idle.pop(key)

    def _make(self, key: K, shared: _Shared[V], make: Callable[[], V]) -> V:
        try:
            image = shared.image = make()
            return image
        except BaseException:
            with self._lock:
                del self._table[key]
            raise
        finally:
            shared.ready.set()

    def _lease(self, key: K, shared: _Shared[V], image: V) -> Lease[V]:
        return Lease(image, lambda: self._release(key, shared))

    def _release(self, key: K, shared: _Shared[V]) -> None:
        with self._lock:
            shared.users -= 1
            if not shared.users and self._table.get(key) is shared:
                shared.idle_since = self._clock()
                self._idle[key] = shared

    def sweep(self) -> None:
        """Close what nobody has used for long enough."""
        now = self._clock()
        with self._lock:
            due = [key for key, shared in self._idle.items() if self._is_due(shared, now)]
            surplus = [self._take(key) for key in due]
        _close(surplus)

    def _is_due(self, shared: _Shared[V], now: float) -> bool:
        return shared.image is not None and now - shared.idle_since >= self._linger_s(shared.image)

    def close(self) -> None:
        """Close all images, leased or not; for the end of the process."""
        with self._lock:
            surplus = list(self._table.values())
            self._table.clear()
            self._idle.clear()
        _close(surplus)


def _close(images: list[_Shared[V]]) -> None:
    for shared in images:
        if shared.image is not None:
            with contextlib.suppress(OSError):
                shared.image.close()
