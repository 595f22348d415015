"""Fixtures of the whole suite, the head line about real parts, and the leak check at its end.

Use `require("fuse")` (from here or tests.parts) for anything a machine may lack. File systems:
`ext4_dir`, `xfs_dir`, `btrfs_dir` are fresh directories on file systems that one worker shares;
`any_fs_dir` and `reflink_dir` run a test on each kind; `small_fs(kind, size)` makes one of its
own, for instance to fill it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import parts
from tests.ceph.cluster import Cluster, running
from tests.filesystems import GIB, loops_below, mounted, mounts_below, unmount
from tests.parts import require

__all__ = ["require"]

SHARED_SIZE = 16 * GIB  # sparse: costs what is written
_TOKEN = "BACKYFS_TEST_RUN"

SmallFs = Callable[[str, int], Path]


# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    # Every process a test starts inherits this, however far it detaches: the leak check finds it.
    if not hasattr(config, "workerinput"):
        os.environ[_TOKEN] = secrets.token_hex(8)
    # The user's own settings must not reach the program under test.
    for name in ("BACKYFS_BACKUP_DIR", "BACKYFS_CONFIG", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    # A shell without job control has what it starts with `&` ignore this, and all below it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return parts.summary()


# ---- file systems ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What ends a run in the program ends it in no later test, nor in what that one forks."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def _file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Gives the worker's file system of a kind, made when first asked for."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Path] = {}

        def get(kind: str) -> Path:
            require(kind)
            if kind not in made:
                where = tmp_path_factory.mktemp(f"{kind}-", numbered=True)
                made[kind] = stack.enter_context(mounted(kind, where, SHARED_SIZE))
            return made[kind]

        yield get


@contextlib.contextmanager
def _fresh_directory(file_system: Path) -> Iterator[Path]:
    directory = file_system / secrets.token_hex(4)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def ext4_dir(_file_systems: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on ext4 (no reflinks)."""
    with _fresh_directory(_file_systems("ext4")) as directory:
        yield directory


@pytest.fixture
def xfs_dir(_file_systems: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on XFS with reflinks."""
    with _fresh_directory(_file_systems("xfs")) as directory:
        yield directory


@pytest.fixture
def btrfs_dir(_file_systems: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on btrfs."""
    with _fresh_directory(_file_systems("btrfs")) as directory:
        yield directory


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def any_fs_dir(
    request: pytest.FixtureRequest, _file_systems: Callable[[str], Path]
) -> Iterator[Path]:
    """A fresh directory on each kind of file system in turn."""
    with _fresh_directory(_file_systems(request.param)) as directory:
        yield directory


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_dir(
    request: pytest.FixtureRequest, _file_systems: Callable[[str], Path]
) -> Iterator[Path]:
    """A fresh directory on each kind of file system with reflinks in turn."""
    with _fresh_directory(_file_systems(request.param)) as directory:
        yield directory


# ---- Ceph --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The worker's cluster, for tests that leave its daemons alone; see `ceph`."""
    require("ceph")
    with running(tmp_path_factory.mktemp("ceph")) as cluster:
        yield cluster


@pytest.fixture
def ceph(shared_ceph: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A running cluster with an empty pool `rbd`, which programs and librados find by CEPH_CONF."""
    monkeypatch.setenv("CEPH_CONF", str(shared_ceph.conf))
    monkeypatch.delenv("CEPH_ARGS", raising=False)
    yield shared_ceph
    shared_ceph.empty("rbd")


# ---- more file systems -------------------------------------------------------------------------


@pytest.fixture
def small_fs(tmp_path: Path) -> Iterator[SmallFs]:
    """`small_fs(kind, size)`: a file system of its own, `size` bytes (or its mkfs's minimum)."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, size: int) -> Path:
            where = tmp_path / f"fs-{secrets.token_hex(4)}"
            where.mkdir()
            return stack.enter_context(mounted(kind, where, size))

        yield make


# ---- nothing is left behind --------------------------------------------------------------------


def _processes_of_this_run() -> list[str]:
    """Processes started by tests that still run, as "pid command"."""
    mark = f"{_TOKEN}={os.environ[_TOKEN]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # a zombie has none
                    found.append(f"{entry.name} {command.strip()}")
    return found


def _patiently(look: Callable[[], list[str]], patience_s: float = 5.0) -> list[str]:
    """What `look` still finds when it was given time to go away."""
    deadline = time.monotonic() + patience_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _leaks(base: Path) -> list[str]:
    processes = _patiently(_processes_of_this_run)
    mounts = mounts_below(base)
    for mountpoint in mounts:
        with contextlib.suppress(RuntimeError):
            unmount(mountpoint, patience_s=0)
    loops = _patiently(lambda: loops_below(base), patience_s=1.0)
    return (
        [f"process still running: {line}" for line in processes]
        + [f"still mounted: {path}" for path in mounts]
        + [f"loop device in use: {line}" for line in loops]
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when processes, mounts or loop devices of its tests are left."""
    config = session.config
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    leaks = _leaks(factory.getbasetemp())
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if leaks and reporter is not None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        report = pytest.TestReport(
            nodeid="leak check",
            location=("tests/conftest.py", None, "leak check"),
            keywords={},
            outcome="failed",
            longrepr="\n".join(leaks),
            when="teardown",
        )
        reporter.stats.setdefault("error", []).append(report)
