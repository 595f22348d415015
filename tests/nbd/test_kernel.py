"""The kernel's own client: a virtual machine attaches exports and mounts what is in them.

One boot does it all; each test looks at a part of what the machine reported. The server of `packs`
serves all VMs, that of `cow` one VM's directory, where the name of a revision is enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.nbd import machine
from tests.nbd.disks import HELLO, PART_SIZE, SIZE
from tests.nbd.service import Service, serving
from tests.nbd.site import STORES, Site

# Before each: $vm, with which names in the report begin; $port and $name, the export.
_FUNCTIONS = f"""
attach() {{ # DEVICE NAME [OPTION...]; the first open makes the kernel look for partitions
    local device=$1 export=$2; shift 2
    nbd-client -N "$export" {machine.HOST} $port /dev/$device "$@" || report $vm.refused $export
    dd if=/dev/$device of=/dev/null bs=512 count=1 2>/dev/null
}}
checksum() {{ sha256sum $1 | cut -d ' ' -f 1; }}
"""

_READ_ONLY = """
attach nbd0 "$name" -C 4
report $vm.read-only $(cat /sys/block/nbd0/ro)
report $vm.sectors $(cat /sys/block/nbd0/size)
report $vm.partitions $(ls -d /sys/block/nbd0/nbd0p* | wc -l)
mount -t ext4 -o ro /dev/nbd0p1 /mnt && report $vm.clean $(checksum /mnt/data) && umount /mnt
mount -t ext4 -o ro /dev/nbd0p2 /mnt && report $vm.dirty mounted && umount /mnt
mount -t ext4 -o ro,noload /dev/nbd0p2 /mnt && report $vm.noload $(cat /mnt/hello) && umount /mnt
dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 conv=fsync 2>/dev/null && report $vm.overwritten
nbd-client -d /dev/nbd0
report $vm.detached $([ -e /sys/block/nbd0/pid ] || echo yes)
"""

_WRITABLE = """
attach nbd1 "$name@rw"
report $vm.rw.read-only $(cat /sys/block/nbd1/ro)
mount -t ext4 /dev/nbd1p2 /mnt
report $vm.rw.late $(checksum /mnt/late)
echo 'new and gone' > /mnt/new && dd if=/mnt/late of=/mnt/more bs=4k 2>/dev/null && sync
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/nbd1p2 /mnt
report $vm.rw.new $(cat /mnt/new)
report $vm.rw.more $(checksum /mnt/more)
umount /mnt
nbd-client -d /dev/nbd1
attach nbd1 "$name@rw"
mount -t ext4 /dev/nbd1p2 /mnt
report $vm.again.new $([ -e /mnt/new ] && echo kept)
report $vm.again.late $(checksum /mnt/late)
umount /mnt
nbd-client -d /dev/nbd1
"""

_PARTITION = """
attach nbd2 "$name/p1"
report $vm.p1.sectors $(cat /sys/block/nbd2/size)
mount -t ext4 -o ro /dev/nbd2 /mnt && report $vm.p1.clean $(checksum /mnt/data) && umount /mnt
nbd-client -d /dev/nbd2
"""


@dataclass(frozen=True)
class Attached:
    """What the machine reported of one VM, and what was left of it on the host."""

    results: dict[str, str]
    unchanged: bool
    sockets_left: int


@pytest.fixture(scope="module")
def reports(
    site: Site, vm: machine.Machine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Attached]]:
    """What came of the job, by the format of the store."""
    log = tmp_path_factory.mktemp("kernel") / "log"
    with serving(site.base, log) as all_vms, serving(site.base / "cow", log) as one:
        servers = {"packs": all_vms, "cow": one}
        names = {"packs": f"packs/{site.ids('packs')[-1]}", "cow": site.ids("cow")[-1]}
        before = {store: (site.fingerprint(store), servers[store].sockets()) for store in STORES}
        job = "".join(
            f"vm={store} port={servers[store].port} name={names[store]}\n"
            + (_READ_ONLY + _WRITABLE + _PARTITION)
            for store in STORES
        )
        found = machine.results(vm.run(_FUNCTIONS + job))
        yield {
            store: Attached(
                {
                    name.removeprefix(f"{store}."): value
                    for name, value in found.items()
                    if name.startswith(f"{store}.")
                },
                site.fingerprint(store) == files,
                _sockets_left(servers[store], sockets),
            )
            for store, (files, sockets) in before.items()
        }


def _sockets_left(service: Service, before: int) -> int:
    """How many more sockets there are than before, when it had time to close them."""
    deadline = time.monotonic() + 10
    while service.sockets() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    return service.sockets() - before


@pytest.fixture(params=STORES)
def attached(request: pytest.FixtureRequest, reports: dict[str, Attached]) -> Attached:
    return reports[request.param]


def test_a_clean_partition_is_mounted_over_four_connections(attached: Attached, site: Site) -> None:
    found = attached.results
    assert "refused" not in found
    assert found["read-only"] == "1"
    assert found["sectors"] == str(SIZE // 512)
    assert found["partitions"] == "2"
    assert found["clean"] == site.disk.checksum
    assert "overwritten" not in found


def test_a_dirty_partition_needs_noload_where_it_cannot_be_written(attached: Attached) -> None:
    assert "dirty" not in attached.results
    assert attached.results["noload"] == HELLO


def test_a_dirty_journal_is_replayed_on_an_overlay(attached: Attached, site: Site) -> None:
    found = attached.results
    assert found["rw.read-only"] == "0"
    assert found["rw.late"] == site.disk.late
    assert found["rw.new"] == "new and gone"
    assert found["rw.more"] == site.disk.late


def test_an_overlay_is_gone_with_its_connection(attached: Attached, site: Site) -> None:
    assert attached.results["again.new"] == ""
    assert attached.results["again.late"] == site.disk.late
    assert attached.unchanged


def test_a_partition_is_an_export_of_its_own(attached: Attached, site: Site) -> None:
    assert attached.results["p1.sectors"] == str(PART_SIZE // 512)
    assert attached.results["p1.clean"] == site.disk.checksum


def test_detaching_leaves_nothing(attached: Attached) -> None:
    assert attached.results["detached"] == "yes"
    assert attached.sockets_left == 0
