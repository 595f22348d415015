"""The stores that are served, and the virtual machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd import machine
from tests.nbd.service import Service, serving
from tests.nbd.site import Site, make_site


@pytest.fixture(scope="session")
def site(_file_systems: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """VMs in both formats; nobody changes them."""
    base = _file_systems("xfs") / "nbd-site"
    base.mkdir()
    return make_site(base, tmp_path_factory.mktemp("nbd-site"))


@pytest.fixture(scope="session")
def service(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server of all VMs."""
    with serving(site.base, tmp_path_factory.mktemp("nbd") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def vm() -> machine.Machine:
    """A virtual machine with a Linux kernel that has NBD."""
    return machine.assemble()
