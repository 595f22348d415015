"""Which Consul agent to ask, and with which token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from backyfs.errors import ConfigError, SourceUnavailable

if TYPE_CHECKING:
    from ssl import SSLContext

PORT = 8500
_TOKEN_MAX = 4096


class ConsulError(SourceUnavailable):
    """Consul cannot be reached, refuses, or answers nonsense; or its token cannot be read."""


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent's address. `token_file` holds the token, `secret` is one ("" = none of them).

    `secure`: speak TLS; `ca_file` is whom to trust then ("" = whom the system trusts).
    `patience_s`: how long one answer may take, in seconds, when it is not asked to wait.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    secure: bool = False
    token_file: str = ""
    secret: str = field(default="", repr=False)
    ca_file: str = ""
    patience_s: float = 10.0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"Consul at {'https' if self.secure else 'http'}://{host}:{self.port}"

    def token(self) -> str:
        """The token, read anew each time: it may be replaced at any moment. ConsulError."""
        if not self.token_file:
            return self.secret
        try:
            with open(self.token_file, "rb") as stream:
                text = stream.read(_TOKEN_MAX + 1).decode(errors="replace").strip()
        except OSError as exc:
            raise ConsulError(
                f"cannot read the Consul token in {self.token_file}: {exc.strerror}",
                hint="see `consul-token-file` in the job's source",
            ) from exc
        if not is_token(text):
            raise ConsulError(f"there is no Consul token in {self.token_file}")
        return text

    def tls(self) -> SSLContext:
        """How to check the agent's certificate. ConsulError."""
        from ssl import create_default_context

        try:
            return create_default_context(cafile=self.ca_file or None)
        except OSError as exc:  # an SSLError is one
            raise ConsulError(
                f"cannot read the certificates in {self.ca_file}: {exc.strerror}",
                hint="see `consul-ca-file` in the job's source",
            ) from exc


def is_token(text: str) -> bool:
    """Whether `text` can be sent as a token."""
    return 0 < len(text) <= _TOKEN_MAX and text.isascii() and text.isprintable()


def agent(
    address: str = "",
    *,
    token_file: str = "",
    secret: str = "",
    ca_file: str = "",
    environment: Mapping[str, str] = os.environ,
) -> Agent:
    """The agent at `address`: http://HOST:PORT, https://HOST:PORT or HOST:PORT. ConfigError.

    What is "" comes from the environment, as with Consul's own program: CONSUL_HTTP_ADDR,
    CONSUL_HTTP_TOKEN_FILE, CONSUL_CACERT. Without a port it is 8500, 8501 with TLS.
    """
    text = address or environment.get("CONSUL_HTTP_ADDR", "") or f"http://127.0.0.1:{PORT}"
    host, port, secure = _parts(text if "://" in text else f"http://{text}", text)
    if not secret and not token_file:
        token_file = environment.get("CONSUL_HTTP_TOKEN_FILE", "")
    ca_file = ca_file or environment.get("CONSUL_CACERT", "")
    return Agent(host, port, secure, token_file, secret, ca_file)


def _parts(url: str, text: str) -> tuple[str, int, bool]:
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:
        parts, port = urlsplit(""), None
    plain = not (parts.username or parts.query or parts.fragment or parts.path.strip("/"))
    if parts.scheme in ("http", "https") and parts.hostname and port != 0 and plain:
        secure = parts.scheme == "https"
        return parts.hostname, port or (PORT + secure), secure
    raise ConfigError(
        f"{text!r} is no address of a Consul agent", hint="write it like http://127.0.0.1:8500"
    )
