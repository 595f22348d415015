"""Certificates for tests, made by GnuTLS's certtool: an authority, a server's, a client's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.parts import require

# Some versions of QEMU take only keys that may encrypt other keys, as those of ECDSA never do.
_KEY = "--generate-privkey", "--key-type=rsa", "--bits=2048"
_USES = {
    "ca": "cn=test authority\nca\ncert_signing_key\nexpiration_days=2\n",
    "server": "cn=localhost\ndns_name=localhost\nip_address=127.0.0.1\n"
    "tls_www_server\nsigning_key\nencryption_key\nexpiration_days=2\n",
    "client": "cn=a client\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days=2\n",
}


def make_certificates(directory: Path) -> Path:
    """`ca-cert.pem`, `server-cert.pem`, `client-cert.pem` and their `…-key.pem` below it."""
    directory.mkdir()
    for name in _USES:
        _make(directory, name)
    return directory


def _make(directory: Path, name: str) -> None:
    key, certificate = directory / f"{name}-key.pem", directory / f"{name}-cert.pem"
    template = directory / f"{name}.cfg"
    template.write_text(_USES[name])
    _certtool(*_KEY, f"--outfile={key}")
    signed_by = (
        ("--generate-self-signed",)
        if name == "ca"
        else (
            "--generate-certificate",
            f"--load-ca-certificate={directory / 'ca-cert.pem'}",
            f"--load-ca-privkey={directory / 'ca-key.pem'}",
        )
    )
    made = f"--load-privkey={key}", f"--template={template}", f"--outfile={certificate}"
    _certtool(*signed_by, *made)


def _certtool(*options: str) -> None:
    subprocess.run([require("certtool"), *options], capture_output=True, check=True)
