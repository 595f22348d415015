"""Consul and a hypervisor in a process of their own, which prints Consul's address.

    python -m tests.source.flyingcircus.host DIRECTORY-OF-A-CLUSTER VM IMAGE...

It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.ceph.cluster import Cluster
from tests.source.flyingcircus.consul import Store, serving
from tests.source.flyingcircus.hypervisor import Hypervisor, Take


def taking(cluster: Cluster, image: str, *, frozen: bytes = b"", running: bytes = b"") -> Take:
    """Takes snapshots of an image; its first bytes say in what state the guest is, if wanted."""
    import rbd

    def take(name: str) -> bool:
        with cluster.image(image) as opened:
            opened.write(frozen, 0)
            try:
                opened.create_snap(name)
            except rbd.ImageExists:
                return False
            finally:
                opened.write(running, 0)
            return True

    return take


@contextlib.contextmanager
def hosting(cluster: Cluster, vm: str, *images: str) -> Iterator[str]:
    """The address of the Consul to ask while entered."""
    command = [sys.executable, "-m", __name__, str(cluster.directory), vm, *images]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        yield running.stdout.readline().strip()
        running.communicate(timeout=60)
    assert running.returncode == 0


def _main(directory: str, vm: str, *images: str) -> None:
    cluster = Cluster(Path(directory))
    disks = {image: taking(cluster, image) for image in images}
    with serving(Store()) as address, Hypervisor(address, vm, disks).running():
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _main(*sys.argv[1:])
