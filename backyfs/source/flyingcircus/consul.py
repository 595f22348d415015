"""Consul's key-value store over HTTP, as far as snapshot requests need it.

Four calls (https://developer.hashicorp.com/consul/api-docs/kv): read a key or all below a prefix,
perhaps waiting for a change; write; delete. Each is one request on a connection of its own, ends
within a known time and reads a bounded answer, whatever the other end does.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from backyfs.source.flyingcircus.agent import Agent, ConsulError

ANSWER_MAX = 16 << 20
"""Bytes of the largest answer that is read, headers included; a value has 512 KiB at most."""

_PIECE = 1 << 16
_INDEX = re.compile("[0-9]{1,20}")  # of 64 bits


class Entry(NamedTuple):
    """A key and its value; `modified` is the index of the change that wrote it."""

    key: str
    value: bytes
    modified: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found, sorted by key, and the index to wait for a change from (0: not told)."""

    entries: tuple[Entry, ...]
    index: int


class Consul:
    """The store of the Consul that `agent` is part of; each call raises ConsulError."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def read(self, key: str, *, after: int = 0, wait_s: int = 0) -> Listing:
        """The entry of a key, if any. With `after`, an earlier listing's index, only once
        something has changed since, or some `wait_s` seconds (>= 1) have passed.
        """
        return self._listing(key, {"index": after, "wait": f"{wait_s}s"} if after else {}, wait_s)

    def below(self, prefix: str) -> Listing:
        """All entries whose keys begin with `prefix`."""
        return self._listing(prefix, {"recurse": "true"}, 0)

    def write(self, key: str, value: bytes) -> None:
        """Give a key a value."""
        self._changed("PUT", key, {}, value)

    def delete(self, key: str, *, modified: int = 0) -> bool:
        """Whether the key is gone now; with `modified`, only if it was not written since."""
        return self._changed("DELETE", key, {"cas": modified} if modified else {})

    def _listing(self, key: str, options: dict[str, object], wait_s: int) -> Listing:
        answer = self._ask("GET", key, options, wait_s=wait_s)
        index = int(answer.index) if _INDEX.fullmatch(answer.index) else 0
        if answer.status == 404:
            return Listing((), index)
        with self._understood():
            return Listing(tuple(sorted(map(_entry, _list(answer.body)))), index)

    def _changed(
        self, method: str, key: str, options: dict[str, object], value: bytes | None = None
    ) -> bool:
        answer = self._ask(method, key, options, value)
        with self._understood():
            return {b"true": True, b"false": False}[answer.body.strip()]

    def _ask(
        self,
        method: str,
        key: str,
        options: dict[str, object],
        value: bytes | None = None,
        *,
        wait_s: int = 0,
    ) -> _Answer:
        """What Consul says to one request; only if it is an answer to it."""
        path = f"/v1/kv/{quote(key)}"
        if options:
            path = f"{path}?{urlencode(options)}"
        # Consul waits up to a sixteenth longer than it is asked to, lest all wake at a time.
        deadline = time.monotonic() + wait_s * 17 / 16 + self._agent.patience_s
        headers = {"X-Consul-Token": token} if (token := self._agent.token()) else {}
        with self._explained(), contextlib.closing(self._connection(deadline)) as connection:
            connection.request(method, path, value, headers)
            # The connection forgets a response without a length, which then is the one to close.
            with connection.getresponse() as response:
                answer = _read(response)
        if answer.status == 200 or (answer.status == 404 and method == "GET"):
            return answer
        raise self._refusal(answer)

    def _connection(self, deadline: float) -> HTTPConnection:
        agent = self._agent
        connection = (
            HTTPSConnection(agent.host, agent.port, timeout=agent.patience_s, context=agent.tls())
            if agent.secure
            else HTTPConnection(agent.host, agent.port, timeout=agent.patience_s)
        )
        connection.response_class = partial(_Response, deadline)  # type: ignore[assignment]
        return connection

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what sockets and the HTTP parser raise in here as a ConsulError."""
        try:
            yield
        except TimeoutError as exc:
            raise ConsulError(f"{self._agent} does not answer", hint=_SEE) from exc
        except _TooMuch as exc:
            raise ConsulError(f"{self._agent} answers more than {ANSWER_MAX >> 20} MiB") from exc
        except ConnectionResetError as exc:  # before HTTPException: RemoteDisconnected is both
            raise ConsulError(f"{self._agent} closed the connection", hint=_SEE) from exc
        except OSError as exc:
            reason = exc.strerror or exc
            raise ConsulError(f"{self._agent} cannot be reached: {reason}", hint=_SEE) from exc
        except (HTTPException, ValueError) as exc:
            raise ConsulError(f"{self._agent} does not speak HTTP, or broke off") from exc

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """A ConsulError when an answer of status 200 is none."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise ConsulError(
                f"{self._agent} answers what no Consul does",
                hint="see `consul` in the job's source",
            ) from exc

    def _refusal(self, answer: _Answer) -> ConsulError:
        said = " ".join(answer.body[:300].decode(errors="replace").split())
        said = "".join(c if c.isprintable() else "?" for c in said)
        hint = _SEE
        if answer.status in (401, 403):
            hint = 'the token needs: key_prefix "snapshot/" { policy = "write" }'
        return ConsulError(f"{self._agent} answers {answer.status}: {said}", hint=hint)


_SEE = "see: consul members; the address is `consul` in the job's source"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    index: str
    body: bytes


def _read(response: HTTPResponse) -> _Answer:
    pieces = []
    while piece := response.read(_PIECE):  # never at once: that would allocate what is announced
        pieces.append(piece)
    if response.length:
        raise HTTPException("broke off")
    return _Answer(response.status, response.headers.get("X-Consul-Index", ""), b"".join(pieces))


def _list(body: bytes) -> list[dict[str, Any]]:
    found = json.loads(body)
    if not isinstance(found, list):
        raise TypeError("no list")
    return found


def _entry(found: dict[str, Any]) -> Entry:
    key, value, modified = found["Key"], found["Value"], found["ModifyIndex"]
    if not isinstance(key, str) or type(modified) is not int:
        raise TypeError("no entry")
    key.encode()  # half a surrogate pair cannot be asked for
    return Entry(key, base64.b64decode(value or "", validate=True), modified)  # null: empty


class _TooMuch(Exception):
    """The answer is larger than anything that can be meant."""


class _Response(HTTPResponse):
    """A response that ends at a deadline, however slowly it drips."""

    def __init__(self, deadline: float, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_Bounded(raw, sock, deadline))


class _Bounded(io.RawIOBase):
    """What a peer sends: no more than ANSWER_MAX bytes, and nothing after `deadline`."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline
        self._left = ANSWER_MAX

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        count = self._raw.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise _TooMuch
        return int(count)

    def close(self) -> None:
        self._raw.close()
        super().close()
