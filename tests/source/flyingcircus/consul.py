"""A double of Consul's key-value store, on a real socket of 127.0.0.1.

It follows Consul's agent/kvs_endpoint.go and agent/consul/state/kvs.go (1.2x): one index grows with
every change of anything; a key answers with the index of its own last change, what is not there
with that of the whole store; a query with an index waits until its answer's is greater, or for
`wait` and up to a sixteenth more. Writing what is there already changes nothing. Deleting with an
index is true when the key has that one, or is not there. Not here: sessions and locks, data
centres, namespaces.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

VALUE_MAX = 512 << 10
_KEY = re.compile(r"[A-Za-z0-9,_./-]+")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 0.0}


@dataclass(frozen=True)
class Stored:
    """A key as it is stored."""

    key: str
    value: bytes
    created: int
    modified: int
    flags: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "LockIndex": 0,
            "Key": self.key,
            "Flags": self.flags,
            "Value": base64.b64encode(self.value).decode() or None,
            "CreateIndex": self.created,
            "ModifyIndex": self.modified,
        }


class Store:
    """The state of a Consul; `tokens` maps a token to the prefix it may write ("": anybody may).

    `leader` False: there is no cluster leader. `calls`: what was asked, as "METHOD path".
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = {"": ""} if tokens is None else tokens
        self.leader = True
        self.calls: list[str] = []
        self._keys: dict[str, Stored] = {}
        self._index = 7
        self._graves: dict[str, int] = {}
        self._changed = threading.Condition()

    def allowed(self, token: str, key: str) -> bool:
        return token in self.tokens and key.startswith(self.tokens[token])

    def put(self, key: str, value: bytes, *, cas: int | None = None, flags: int = 0) -> bool:
        with self._changed:
            there = self._keys.get(key)
            if cas is not None and cas != (there.modified if there else 0):
                return False
            if there is None or (there.value, there.flags) != (value, flags):
                self._index += 1
                created = there.created if there else self._index
                self._keys[key] = Stored(key, value, created, self._index, flags)
                self._changed.notify_all()
            return True

    def delete(self, key: str, *, cas: int | None = None, recurse: bool = False) -> bool:
        with self._changed:
            there = self._keys.get(key)
            if cas is not None and there and there.modified != cas:
                return False
            doomed = [k for k in self._keys if (k.startswith(key) if recurse else k == key)]
            if doomed:
                self._index += 1
                for name in doomed:
                    del self._keys[name]
                    self._graves[name] = self._index
                self._changed.notify_all()
            return True

    def get(
        self, key: str, *, recurse: bool = False, after: int = 0, wait_s: float = 0.0
    ) -> tuple[list[Stored], int]:
        """What is there, and the index to wait for the next change with."""
        end = time.monotonic() + wait_s * (1 + random.random() / 16)
        with self._changed:
            found, index = self._find(key, recurse)
            while index <= after and (left_s := end - time.monotonic()) > 0:
                self._changed.wait(left_s)
                found, index = self._find(key, recurse)
            return found, index

    def _find(self, key: str, recurse: bool) -> tuple[list[Stored], int]:
        if not recurse:
            there = self._keys.get(key)
            return ([there], there.modified) if there else ([], self._index)
        found = sorted(
            (one for name, one in self._keys.items() if name.startswith(key)),
            key=lambda one: one.key,
        )
        marks = [one.modified for one in found]
        marks += [index for name, index in self._graves.items() if name.startswith(key)]
        return found, max(marks, default=self._index)

    def below(self, prefix: str) -> dict[str, bytes]:
        """All keys with a prefix."""
        return {one.key: one.value for one in self.get(prefix, recurse=True)[0]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        store, url = self.server.store, urlsplit(self.path)
        store.calls.append(f"{self.command} {self.path}")
        options = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = unquote(url.path).removeprefix("/v1/kv/")
        if refusal := self._refusal(url.path, key, options, body):
            self._answer(refusal[0], refusal[1].encode())
            return
        cas = int(options["cas"]) if "cas" in options else None
        if self.command == "PUT":
            done = store.put(key, body, cas=cas, flags=int(options.get("flags", 0)))
            self._answer(200, json.dumps(done).encode())
        elif self.command == "DELETE":
            done = store.delete(key, cas=cas, recurse="recurse" in options)
            self._answer(200, json.dumps(done).encode())
        else:
            self._get(key, options)

    def _refusal(
        self, path: str, key: str, options: dict[str, str], body: bytes
    ) -> tuple[int, str] | None:
        store, token = self.server.store, self.headers.get("X-Consul-Token", "")
        number = [options.get(name, "0") for name in ("index", "cas", "flags")]
        if not path.startswith("/v1/kv/"):
            return 404, ""
        if (key or "recurse" not in options) and not _KEY.fullmatch(key):
            return 400, "key contains invalid character" if key else "Missing key name"
        if not all(text.isdigit() for text in number):
            return 400, "Invalid index"
        if _seconds(options.get("wait", "")) is None:
            return 400, "Invalid wait time"
        if self.command == "DELETE" and {"recurse", "cas"} <= options.keys():
            return 400, "Conflicting flags: cas=&recurse="
        if len(body) > VALUE_MAX:
            return 413, f"Request body({len(body)} bytes) too large, max size: {VALUE_MAX} bytes."
        if not store.leader:
            return 500, "No cluster leader"
        if not store.allowed(token, key):
            access = "read" if self.command == "GET" else "write"
            return 403, f"Permission denied: token with AccessorID '' lacks 'key:{access}'"
        return None

    def _get(self, key: str, options: dict[str, str]) -> None:
        many = bool({"recurse", "keys"} & options.keys())
        after = int(options.get("index", 0))
        wait_s = (_seconds(options.get("wait", "")) or 300.0) if after else 0.0
        found, index = self.server.store.get(key, recurse=many, after=after, wait_s=wait_s)
        if not found:
            self._answer(404, b"", index)
        elif "keys" in options:
            self._answer(200, json.dumps(_names(found, key, options)).encode(), index)
        elif "raw" in options and "recurse" not in options:
            self._answer(200, found[0].value, index)
        else:
            self._answer(200, json.dumps([one.as_json() for one in found]).encode(), index)

    def _answer(self, status: int, body: bytes, index: int = 0) -> None:
        self.send_response(status)
        if index:
            self.send_header("X-Consul-Index", str(index))
            self.send_header("X-Consul-KnownLeader", "true")
            self.send_header("X-Consul-LastContact", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _names(found: list[Stored], prefix: str, options: dict[str, str]) -> list[str]:
    """Keys, those alike up to the separator behind the prefix as one."""
    if not (separator := options.get("separator", "")):
        return [one.key for one in found]
    names: dict[str, None] = {}
    for one in found:
        head, mark, _ = one.key[len(prefix) :].partition(separator)
        names[prefix + head + mark] = None
    return list(names)


def _seconds(text: str) -> float | None:
    """Go's durations, of one unit; None when it is none."""
    number = text.rstrip("ms")
    unit = text[len(number) :]
    if not text:
        return 0.0
    if unit not in _UNITS or not number.isdigit():
        return None
    return int(number) * _UNITS[unit]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, store: Store, port: int) -> None:
        self.store = store
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, *_: object) -> None:
        """A client that hung up is no matter of ours."""


@contextlib.contextmanager
def serving(store: Store, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server of `store` while entered."""
    with _Server(store, port) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
