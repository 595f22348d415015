"""TLS for the server: certificate, key, and whose client certificates are welcome."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import ConfigError, UsageError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's certificate (with its chain) and key, and the authority that signed
    the certificates of clients (None: clients need none).
    """

    certificate: Path
    key: Path
    authority: Path | None = None


def context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 or newer, with these files. ConfigError names the one that cannot be used."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_RENEGOTIATION
    for path in (files.certificate, files.key, files.authority):
        if path is not None:
            _require_readable(path)
    try:
        made.load_cert_chain(files.certificate, files.key, password=_no_password)
    except (ssl.SSLError, UsageError) as exc:
        why = exc.message if isinstance(exc, UsageError) else _reason(exc)
        raise ConfigError(
            f"TLS: {files.certificate} and {files.key} are no certificate with its key: {why}",
            hint="both are PEM files; the key has no passphrase",
        ) from exc
    if files.authority is not None:
        try:
            made.load_verify_locations(files.authority)
        except ssl.SSLError as exc:
            raise ConfigError(
                f"TLS: {files.authority} holds no certificates: {_reason(exc)}",
                hint="it is the PEM file of the authority that signed the clients' certificates",
            ) from exc
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def _no_password() -> str:
    raise UsageError("the key has a passphrase")


def _require_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as exc:
        raise ConfigError(f"TLS: cannot read {path}: {exc.strerror}") from exc


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or str(exc)).replace("_", " ").lower()
