"""TLS: clients with certificates get in, all others stay out."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.certificates import make_certificates
from tests.nbd.disks import SIZE
from tests.nbd.service import Service, client, client_fails, serving
from tests.nbd.site import Site
from tests.parts import require


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "pki")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "strangers")


@pytest.fixture(scope="module")
def secured(
    site: Site, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    options = (
        *("--tls-cert", certificates / "server-cert.pem"),
        *("--tls-key", certificates / "server-key.pem"),
        *("--tls-ca", certificates / "ca-cert.pem"),
    )
    with serving(site.base, tmp_path_factory.mktemp("tls") / "log", *options) as running:
        yield running


def uri(service: Service, certificates: Path) -> str:
    return f"nbds://localhost:{service.port}/packs/latest?tls-certificates={certificates}"


def test_libnbd(secured: Service, site: Site, certificates: Path, tmp_path: Path) -> None:
    require("libnbd")
    found = json.loads(client("nbdinfo", "--json", uri(secured, certificates)))
    assert found["TLS"]
    assert found["exports"][0]["export-size"] == SIZE
    target = tmp_path / "copy"
    client("nbdcopy", "--connections=2", uri(secured, certificates), target)
    assert filecmp.cmp(target, site.disk.image, shallow=False)


def test_qemu_img(secured: Service, site: Site, certificates: Path) -> None:
    require("qemu-img")
    credentials = f"tls-creds-x509,id=tls,dir={certificates},endpoint=client"
    server = f"server.type=inet,server.host=localhost,server.port={secured.port}"
    image = f"driver=nbd,{server},tls-creds=tls,export=cow/latest"
    with_tls = "--object", credentials, "--image-opts"
    assert f"{SIZE} bytes" in client("qemu-img", "info", *with_tls, image)
    raw = f"driver=raw,file.filename={site.disk.image}"
    assert "identical" in client("qemu-img", "compare", *with_tls, image, raw)


def test_those_without_a_certificate_stay_out(
    secured: Service, certificates: Path, strangers: Path, tmp_path: Path
) -> None:
    require("libnbd")
    client_fails("nbdinfo", "--size", f"nbd://localhost:{secured.port}/packs/latest")
    client_fails("nbdinfo", "--list", f"nbd://localhost:{secured.port}/")
    anonymous = tmp_path / "anonymous"
    anonymous.mkdir()
    (anonymous / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    client_fails("nbdinfo", "--size", uri(secured, anonymous))
    for name in ("client-cert.pem", "client-key.pem"):
        (anonymous / name).write_bytes((strangers / name).read_bytes())
    client_fails("nbdinfo", "--size", uri(secured, anonymous))
    assert int(client("nbdinfo", "--size", uri(secured, certificates))) == SIZE
