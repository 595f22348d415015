"""How mounts begin and end: commands, signals, crashes; nothing stale is ever left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.errors import NoRepository, TargetError
from backyfs.mount.daemon import mount, umount
from backyfs.mount.mountpoint import mounted_at, unmount
from backyfs.store.repository import Repository
from tests.mount.mounts import (
    Mounted,
    eventually,
    helper_of,
    is_alive,
    kill_with_helper,
    mounted,
    server_of,
    watched,
)
from tests.parts import require
from tests.reader.stores import content, make_vm

PIDFD_GETFD = 438

DATA = content(20, seed=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    make_vm(base, "vm", DATA)
    return base


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


@pytest.fixture
def tree(base: Path, point: Path) -> Iterator[Mounted]:
    with mounted(base, point) as mount:
        yield mount


def backyfs(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "backyfs.cli.main", *map(str, arguments)]


def image(point: Path) -> Path:
    return point / "vm/latest/disk.img"


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"b\xc3\xbcro", b"no \xff utf-8, nor\\xff ascii"])
def test_a_base_whose_name_is_not_ascii(name: bytes, tmp_path: Path, point: Path) -> None:
    base = tmp_path / os.fsdecode(name)
    base.mkdir()
    make_vm(base, "vm", DATA)
    with mounted(base, point):
        found = mounted_at(point)
        assert found is not None
        assert found.source == f"backyfs:{base}", "loop finds the tree by it"
        assert image(point).read_bytes() == DATA


def test_the_commands(base: Path, point: Path) -> None:
    require("fuse")
    done = backyfs("-b", base, "mount", point)
    assert (done.returncode, done.stdout) == (0, "")
    with watched(point) as pid:
        assert image(point).read_bytes() == DATA, "ready when the command returns"
        done = backyfs("umount", point)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not is_alive(pid), "gone when the command returns"
        assert mounted_at(point) is None


def test_from_a_directory_with_modules_of_somebody_else(
    base: Path, point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("fuse")
    for name in ("json", "logging", "backyfs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    monkeypatch.chdir(tmp_path)
    mount(base, point)
    with watched(point):
        assert image(point).read_bytes() == DATA
        umount(point)


@pytest.mark.parametrize("how", ["inside", "is", "file", "missing", "full", "twice"])
def test_mountpoints_that_will_not_do(base: Path, point: Path, tmp_path: Path, how: str) -> None:
    require("fuse")
    (tmp_path / "file").touch()
    (base / "vm" / "deep").mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(base / "vm" / "deep")
    target = {
        "inside": tmp_path / "link",
        "is": base,
        "file": tmp_path / "file",
        "missing": tmp_path / "none" / "where",
        "full": tmp_path,
        "twice": point,
    }[how]
    with mounted(base, point) if how == "twice" else contextlib.nullcontext():
        done = backyfs("-b", base, "mount", target)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "Traceback" not in done.stderr
    (base / "vm" / "deep").rmdir()


def test_what_is_said(base: Path, point: Path, tmp_path: Path) -> None:
    with pytest.raises(NoRepository, match="no directory"):
        mount(tmp_path / "none", point)
    with pytest.raises(TargetError, match="nothing is mounted"):
        umount(point)
    with pytest.raises(TargetError, match="not of backyfs"):
        umount(Path("/proc"))
    with pytest.raises(TargetError, match="inside the store"):
        mount(base, base / "vm")


def test_a_busy_tree_is_not_unmounted(tree: Mounted) -> None:
    with open(image(tree.path), "rb"), pytest.raises(TargetError, match="busy"):
        umount(tree.path)
    assert image(tree.path).read_bytes() == DATA
    umount(tree.path)


def test_a_path_with_a_blank_and_a_link(base: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a b\tc\\d"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    require("fuse")
    mount(base, tmp_path / "link")
    with watched(odd) as pid:
        assert image(odd).read_bytes() == DATA
        umount(tmp_path / "link")
        assert not is_alive(pid)


# ---- ends ----------------------------------------------------------------------------------------


def test_umount_8(tree: Mounted) -> None:
    require("root")
    subprocess.run(["umount", tree.path], check=True, timeout=20)
    assert eventually(lambda: not tree.alive())


def test_fusermount3(tree: Mounted) -> None:
    subprocess.run(["fusermount3", "-u", tree.path], check=True, timeout=20)
    assert eventually(lambda: not tree.alive())


def test_a_detached_tree_serves_what_is_open(tree: Mounted) -> None:
    with open(image(tree.path), "rb", buffering=0) as stream:
        stream.read(1)
        umount(tree.path, lazy=True)
        assert mounted_at(tree.path) is None
        stream.seek(0)
        assert stream.readall() == DATA
        assert tree.alive()
    assert eventually(lambda: not tree.alive())


def test_a_detached_tree_does_not_take_its_successor_along(tree: Mounted, base: Path) -> None:
    with open(image(tree.path), "rb", buffering=0) as stream:
        umount(tree.path, lazy=True)
        with mounted(base, tree.path) as second:
            assert stream.readall() == DATA
            stream.close()
            assert eventually(lambda: not tree.alive())
            time.sleep(0.5)  # what tidied up after the first one must not touch the second
            assert second.alive()
            assert image(second.path).read_bytes() == DATA


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(tree: Mounted, number: signal.Signals, busy: bool) -> None:
    fd = os.open(image(tree.path), os.O_RDONLY) if busy else -1
    os.kill(tree.pid, number)
    assert eventually(lambda: not tree.alive())
    with contextlib.suppress(OSError):  # the file is cut off from its mount
        os.close(fd)
    assert mounted_at(tree.path) is None
    assert os.listdir(tree.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_foreground(base: Path, point: Path, number: signal.Signals) -> None:
    require("fuse")
    foreground = command("-b", base, "mount", "-f", point)
    with subprocess.Popen(foreground, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert eventually(lambda: server_of(point) == process.pid)
            with watched(point):
                assert image(point).read_bytes() == DATA
                process.send_signal(number)
                assert process.wait(10) == 0
                assert mounted_at(point) is None
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_killed_process_leaves_no_mount(tree: Mounted) -> None:
    fd = os.open(image(tree.path), os.O_RDONLY)
    os.kill(tree.pid, signal.SIGKILL)
    assert eventually(lambda: mounted_at(tree.path) is None)
    with pytest.raises(OSError, match=r"connect|abort"):
        os.read(fd, 1)
    with contextlib.suppress(OSError):
        os.close(fd)
    assert os.listdir(tree.path) == []


def test_its_end_is_heard_of_when_the_mount_is_dead_already(tree: Mounted) -> None:
    """fusermount3 looks once; a process lets go first of what has the highest number."""
    require("root", "takes descriptors of another process")
    (fuse,) = open_there(tree.pid, "/dev/fuse")
    with contextlib.ExitStack() as stack:
        poll, numbers = select.poll(), {}
        for number in open_there(tree.pid, "socket:"):
            fd = stack.enter_context(borrowed(tree.pid, number))
            poll.register(fd, 0)
            numbers[fd] = number
        helper = helper_of(tree.path)
        os.kill(helper, signal.SIGKILL)
        assert eventually(lambda: not is_alive(helper))
        (lifeline,) = (numbers[fd] for fd, event in poll.poll(0) if event & select.POLLHUP)
    assert lifeline < fuse


def open_there(pid: int, kind: str) -> list[int]:
    """Numbers of the descriptors of a process that are of a kind."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is closed meanwhile
            if os.readlink(fd).startswith(kind):
                found.append(int(fd.name))
    return found


@contextlib.contextmanager
def borrowed(pid: int, number: int) -> Iterator[int]:
    """A descriptor of another process, as one of ours, while entered."""
    process = os.pidfd_open(pid)
    fd = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, number, 0)
    os.close(process)
    assert fd >= 0
    yield fd
    os.close(fd)


def test_a_dead_mount_is_repaired(base: Path, point: Path) -> None:
    with mounted(base, point) as tree:
        kill_with_helper(tree.pid, point)
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.listdir(point)
        with mounted(base, point):
            assert image(point).read_bytes() == DATA
        assert mounted_at(point) is None


def test_a_dead_mount_can_be_unmounted(base: Path, point: Path) -> None:
    with mounted(base, point) as tree:
        kill_with_helper(tree.pid, point)
        umount(point)
        assert mounted_at(point) is None


def test_the_starter_may_die(base: Path, point: Path) -> None:
    """Its terminal, session and process group are not the mount's."""
    require("fuse")
    background = command("-b", base, "mount", point)
    starter = subprocess.Popen(background, start_new_session=True, stderr=subprocess.DEVNULL)
    assert starter.wait(30) == 0
    with watched(point) as pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGHUP)
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.2)
        assert os.getsid(pid) not in (starter.pid, os.getsid(0))
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert image(point).read_bytes() == DATA


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.2, 0.3, 0.5])
def test_the_starter_may_be_killed_at_any_time(base: Path, point: Path, after_s: float) -> None:
    """Then there is a mount that works, or none."""
    require("fuse")
    background = command("-b", base, "mount", point)
    with subprocess.Popen(background, start_new_session=True, stderr=subprocess.DEVNULL) as starter:
        time.sleep(after_s)
        starter.kill()
    marked = os.fsencode(point)
    assert eventually(lambda: bool(server_of(point)) or not _started_for(marked))
    if server_of(point):
        with watched(point):
            assert image(point).read_bytes() == DATA
            umount(point)
    assert mounted_at(point) is None


def _started_for(mark: bytes) -> bool:
    """Whether any process has `mark` in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                return True
    return False


def test_a_foreground_whose_parent_crashes(base: Path, point: Path) -> None:
    """It goes on serving; the terminal's hang-up, or a signal, ends it."""
    require("fuse")
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:]); sys.stdin.read()"
    foreground = command("-b", base, "mount", "-f", point)
    parent = subprocess.Popen([sys.executable, "-c", program, *foreground], stdin=subprocess.PIPE)
    with parent:
        try:
            assert eventually(lambda: bool(server_of(point)))
        finally:
            parent.kill()
    with watched(point) as pid:
        assert image(point).read_bytes() == DATA
        os.kill(pid, signal.SIGHUP)
        assert eventually(lambda: not is_alive(pid))
        assert mounted_at(point) is None


# ---- who may look --------------------------------------------------------------------------------

NOBODY = 65534


def as_nobody(*command: object) -> subprocess.CompletedProcess[str]:
    require("root")
    setpriv = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
    return subprocess.run(
        [str(part) for part in (*setpriv, *command)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that all users reach; what pytest gives is for one, and shared by its workers."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        (Path(directory) / "mnt").mkdir()
        yield Path(directory)


@pytest.mark.parametrize("allowed", [False, True])
def test_others(base: Path, public: Path, allowed: bool) -> None:
    point = public / "mnt"
    with mounted(base, point, allow_other=allowed):
        done = as_nobody("sha256sum", image(point))
        assert (done.returncode == 0) == allowed
        assert allowed or "Permission denied" in done.stderr


def test_others_get_no_scratch_view(base: Path, public: Path, tmp_path: Path) -> None:
    """They may read the image, but not what the operator writes, and write nothing."""
    point = public / "mnt"
    with mounted(base, point, allow_other=True, scratch=tmp_path):
        view = image(point).with_name("disk.rw.img")
        with open(view, "r+b") as stream:
            stream.write(b"a secret of the operator")
        assert "Permission denied" in as_nobody("head", "-c", 24, view).stderr
        written = as_nobody("dd", "if=/dev/zero", f"of={view}", "count=1", "conv=notrunc")
        assert "Permission denied" in written.stderr
        assert as_nobody("sha256sum", image(point)).returncode == 0


def test_the_mount_of_another_user_stays(base: Path, public: Path) -> None:
    point = public / "mnt"
    if as_nobody(sys.executable, "-c", "import backyfs.cli.main").returncode:
        pytest.skip("other users cannot reach this interpreter")
    with mounted(base, point) as tree:
        done = as_nobody(sys.executable, "-m", "backyfs", "umount", point)
        assert done.returncode == 1
        assert done.stderr == (
            f"backyfs: {point} was mounted by another user (uid 0)\n"
            "  only that user and root can unmount it\n"
        )
        assert tree.alive()


def test_a_plain_user_mounts_and_unmounts(public: Path) -> None:
    """With a /dev/fuse that users may open, as on most systems, in a mount namespace of its own."""
    require("root")
    require("fuse")
    if as_nobody(sys.executable, "-c", "import backyfs.cli.main").returncode:
        pytest.skip("needs a checkout that other users can read")
    base, point, scratch = public / "base", public / "mnt", public / "scratch"
    for directory in (base, scratch):
        directory.mkdir()
    repository = make_vm(base, "vm", DATA)
    for path in [base, point, scratch, *base.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    subprocess.run(["mknod", "-m", "666", public / "fuse", "c", "10", "229"], check=True)
    script = _AS_USER.format(
        top=tempfile.gettempdir(),
        dev=public / "fuse",
        python=sys.executable,
        base=base,
        point=point,
        scratch=scratch,
        user=NOBODY,
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-e", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [repository.revisions()[0].id, "at", "by-tag", "latest"]


# The new namespace must not keep alive what other tests mount and unmount meanwhile.
_AS_USER = """
awk -v top={top}/ 'index($2, top) == 1 {{ print $2 }}' /proc/self/mounts | xargs -r -n 1 umount -l
mount --bind {dev} /dev/fuse
echo '# user_allow_other - lets users give the option allow_other' > {scratch}/fuse.conf
mount --bind {scratch}/fuse.conf /etc/fuse.conf
exec setpriv --reuid {user} --regid {user} --clear-groups sh -e -c '
    backyfs="{python} -m backyfs.cli.main"
    if $backyfs -b {base} mount --allow-other {point} 2>{scratch}/said; then exit 8; fi
    grep -q "user_allow_other" {scratch}/said
    $backyfs -b {base} doctor | grep -q "user_allow_other is not set"
    $backyfs -b {base} mount --scratch {scratch}:1M {point}
    trap "fusermount3 -uz {point}" EXIT
    ls {point}/vm
    cmp {point}/vm/latest/disk.img {point}/vm/latest/disk.img
    cat {point}/vm/latest/disk.img > /dev/null
    if touch {point}/new || touch {point}/vm/latest/disk.img; then exit 9; fi 2>/dev/null
    printf changed | dd of={point}/vm/latest/disk.rw.img conv=notrunc status=none
    test "$(head -c 7 {point}/vm/latest/disk.rw.img)" = changed
    $backyfs umount {point}
    trap - EXIT
    test -z "$(ls -A {point})"
'
"""


def test_a_read_only_store_can_be_mounted(tmp_path: Path, point: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    repository: Repository = make_vm(base, "vm", DATA)
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    require("root")
    subprocess.run(["mount", "--bind", base, shadow], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", shadow], check=True)
        with mounted(shadow, point):
            assert (point / "vm" / repository.revisions()[0].id / "disk.img").read_bytes() == DATA
    finally:
        subprocess.run(["umount", shadow], check=True)


def test_a_mount_that_hangs_is_refused_without_a_look_into_it(tree: Mounted, base: Path) -> None:
    os.kill(tree.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TargetError, match="mounted already"):
            mount(base, tree.path)
    finally:
        os.kill(tree.pid, signal.SIGCONT)


def test_the_commands_do_not_wait_for_a_mount_that_hangs(
    base: Path, point: Path, tmp_path: Path
) -> None:
    with mounted(base, point, scratch=tmp_path) as tree:  # writable: a listing changes the atime,
        os.listdir(point)  # so the kernel has to ask before it tells the directory's attributes
        os.kill(tree.pid, signal.SIGSTOP)
        try:
            again = backyfs("-b", base, "mount", point)
            assert (again.returncode, "mounted already" in again.stderr) == (1, True)
            detached = backyfs("umount", "--lazy", point)
            assert (detached.returncode, detached.stderr) == (0, "")
            assert mounted_at(point) is None
        finally:
            os.kill(tree.pid, signal.SIGCONT)


@pytest.fixture
def slow_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unmounts does not end in time."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("umount", "fusermount3"):
        (tools / name).write_text("#!/bin/sh\nexec sleep 600\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr("backyfs.mount.mountpoint._COMMAND_S", 0.0)


def test_what_is_unmounted_has_not_taken_too_long(point: Path, slow_tools: None) -> None:
    unmount(point, lazy=False)  # as if the tool had come that far: nothing is mounted here


def test_an_unmount_that_takes_too_long_names_the_way_out(tree: Mounted, slow_tools: None) -> None:
    with pytest.raises(TargetError, match="takes too long") as caught:
        umount(tree.path)
    assert caught.value.hint == f"detach it now: backyfs umount --lazy {tree.path}"


def test_any_number_may_ask_whether_it_lives(tree: Mounted, base: Path) -> None:
    for _ in range(200):
        assert server_of(tree.path) == tree.pid
    with pytest.raises(TargetError, match="mounted already"):
        mount(base, tree.path)
