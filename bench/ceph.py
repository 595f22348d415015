"""Ceph measured: restoring into an RBD image, reading one, asking what has changed in one.

The cluster is a real one, of one storage daemon on the work directory's disk; it shares the
processors with what is measured, as no cluster in production does. Ratios are of the same cluster
in the same state: each image is gone before the next one is made.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.backups import OURS
from bench.command import Command, run
from bench.footprint import warm
from bench.ledger import Sample
from bench.systems import Backyfs
from bench.workbench import Workbench
from tests.ceph.cluster import Cluster, running

TO_RBD, FROM_RBD, DIFF = "restore to rbd", "read from rbd", "diff of 4000 objects"
PIPED, IMPORTED, EXPORTED = "restore - | rbd import -", "rbd import FILE", "rbd export - | cat"

_PROGRAMS = ("ceph-mon", "ceph-osd", "rbd")
_IMAGE, _SOURCE = "rbd/restored", "rbd/source"
_SNAPSHOT = "bench"
_PROJECT = Path(__file__).parent.parent
_ROOM = 4
"""Bytes of the storage daemon per byte of the image: the source, one restored, and air."""


def ceph(bench: Workbench) -> None:
    """Restore into a new image in each way; read an image's snapshot."""
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    if missing:
        bench.ledger.fail(TO_RBD, OURS, f"needs {', '.join(missing)}")
        return
    with bench.group("ceph") as home:
        system = Backyfs(home / "store", bench.disk)
        system.prepare()
        run([system.backup()])
        size = max(2 << 30, _ROOM * bench.options.size)
        with running(home / "cluster", store="bluestore", size=size) as cluster:
            run([_rbd(cluster, "import", str(bench.disk), _SOURCE)])
            run([_rbd(cluster, "snap", "create", f"{_SOURCE}@{_SNAPSHOT}")])
            for _ in range(bench.options.rounds):
                _take_restores(bench, cluster, system)
                _take_reads(bench, cluster)
            _take_diffs(bench, cluster, home / "diffs")


def _take_restores(bench: Workbench, cluster: Cluster, system: Backyfs) -> None:
    pipe = f"{shlex.join(system.restore_null().argv)} | rbd import --no-progress - {_IMAGE}"
    ways = {
        PIPED: _piped(cluster, pipe),
        IMPORTED: _rbd(cluster, "import", str(bench.disk), _IMAGE),
        OURS: _in(cluster, *system.command("restore", f"rbd:{_IMAGE}").argv),
    }
    for side, step in ways.items():
        warm(system.home)
        bench.take(TO_RBD, side, [step])
        with bench.attempt(TO_RBD, side) as going:
            if going:
                check = f"rbd export --no-progress {_IMAGE} - | cmp - {bench.disk}"
                run([_piped(cluster, check), _rbd(cluster, "rm", _IMAGE)])


def _take_reads(bench: Workbench, cluster: Cluster) -> None:
    export = f"rbd export --no-progress {_SOURCE}@{_SNAPSHOT} - | cat"
    bench.take(FROM_RBD, EXPORTED, [_piped(cluster, export)])
    reader = sys.executable, "-m", "bench.rbdread", *_SOURCE.split("/")
    bench.take(FROM_RBD, OURS, [_in(cluster, *reader)])


def _take_diffs(bench: Workbench, cluster: Cluster, said: Path) -> None:
    """Seconds that a source needs to say what has changed, each time in another image."""
    with bench.attempt(DIFF, OURS):
        script = sys.executable, "-m", "bench.rbddiff", str(bench.options.rounds)
        run([replace(_in(cluster, *script), stdout=said)])
        for line in said.read_text().split():
            bench.enter(DIFF, OURS, Sample(float(line)))


def _rbd(cluster: Cluster, *arguments: str) -> Command:
    return _in(cluster, "rbd", *arguments, "--no-progress")


def _piped(cluster: Cluster, script: str) -> Command:
    return _in(cluster, "bash", "-o", "pipefail", "-c", script)


def _in(cluster: Cluster, *argv: str) -> Command:
    names = "CEPH_CONF", "CEPH_ARGS"
    environment: Mapping[str, str] = {name: cluster.environment[name] for name in names}
    return Command(argv, env={**environment, "PYTHONPATH": os.fspath(_PROJECT)})
