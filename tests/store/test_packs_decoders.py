"""Frames that other processes decode: the same bytes and the same errors, whatever they do."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.model import FRAME
from backyfs.store.contract import StoredImage
from backyfs.store.packs import decoders as module
from backyfs.store.packs.decoder import UNUSED_S
from backyfs.store.packs.decoders import BLOCK_BYTES, FRAMES_MIN, Decoders, decoders
from backyfs.store.packs.library import Library, Part
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm

FRAMES = 40
FIRST = content(FRAMES, seed=8, tail=1000)


def changed(data: bytes, seed: int) -> bytes:
    """With a few bytes of every third frame replaced: patches."""
    rng = random.Random(seed)
    new = bytearray(data)
    for frame in range(seed % 3, FRAMES, 3):
        new[frame * FRAME + 100 : frame * FRAME + 200] = rng.randbytes(100)
    return bytes(new)


LAST = changed(changed(FIRST, 1), 2)


class Counted(Decoders):
    """Decoders that count what they were asked for, and did."""

    done = refused = checked = 0

    def check(self, directory: Path, parts: Sequence[Part]) -> bool:
        sound = super().check(directory, parts)
        self.checked += sound
        self.refused += not sound
        return sound

    def read(self, directory: Path, parts: Sequence[Part], place: memoryview) -> bool:
        place[:] = b"\xaa" * len(place)
        done = super().read(directory, parts, place)
        self.done += done
        self.refused += not done
        return done


@pytest.fixture(scope="module")
def helping() -> Iterator[Counted]:
    found = Library.decoders = Counted(2)
    yield found
    Library.decoders = None
    found.close()


@pytest.fixture
def own() -> Iterator[Counted]:
    """Two that may be ill-treated."""
    before = Library.decoders
    found = Library.decoders = Counted(2)
    yield found
    Library.decoders = before
    found.close()


def newest(vm: Repository) -> StoredImage:
    return vm.open_disk(vm.revisions()[-1], "disk")


def read(image: StoredImage, first: int, count: int) -> bytes:
    place = memoryview(bytearray(count * FRAME))
    image.read_into(first * FRAME, place)
    return bytes(place)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    found = make_vm(tmp_path_factory.mktemp("decoders"), "vm", FIRST, changed(FIRST, 1))
    add_revision(found, LAST)
    return found


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_same_bytes(data: st.DataObject, vm: Repository, helping: Counted) -> None:
    image = newest(vm)
    offset = data.draw(st.integers(0, len(LAST) - 1))
    length = data.draw(st.integers(1, min(BLOCK_BYTES + 2 * FRAME, len(LAST) - offset)))
    place = helping.room(length) if data.draw(st.booleans()) else memoryview(bytearray(length))
    image.read_into(offset, place)
    assert place == LAST[offset : offset + length]
    image.close()


def test_long_runs_are_decoded_elsewhere(tmp_path: Path, own: Counted) -> None:
    data = random.Random(1).randbytes(20 * FRAME)
    image = newest(make_vm(tmp_path, "vm", data))
    for count, expected in ((16, 1), (FRAMES_MIN, 1), (FRAMES_MIN - 1, 0), (17, 0)):
        own.done = 0
        assert read(image, 0, count) == data[: count * FRAME]
        assert own.done == expected, count
    image.close()


def test_what_is_held_stays_readable_when_they_have_closed_it(tmp_path: Path, own: Counted) -> None:
    data = random.Random(1).randbytes(20 * FRAME)
    vm = make_vm(tmp_path, "vm", data)
    data = data[:FRAME] + b"a patch rests on what it changes" + data[FRAME + 32 :]
    add_revision(vm, data)
    image = newest(vm)
    image.hold()
    for done in (1, 0):
        own.done = 0
        assert read(image, 0, 16) == data[: 16 * FRAME]
        assert own.done == done
        shutil.rmtree(tmp_path / "vm/packs", ignore_errors=True)
        time.sleep(UNUSED_S + 0.5)
    assert read(image, 16, 4) == data[16 * FRAME :]
    image.close()


def test_what_is_kept_lies_in_shared_memory(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(32 * FRAME)
    image = newest(make_vm(tmp_path, "vm", data))
    with decoders(kept_bytes=BLOCK_BYTES, count=1) as found:
        kept = [found.room(BLOCK_BYTES) for _ in range(12)]  # more than there are
        shared = [place for place in kept if isinstance(place.obj, ctypes.Array)]
        assert len(shared) == 9
        for number, place in enumerate(kept):
            image.read_into(number * FRAME, place)
        for number, place in enumerate(kept):
            assert place == data[number * FRAME : (number + 16) * FRAME]
    image.close()


def test_a_huge_cache_and_little_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = random.Random(1).randbytes(16 * FRAME)
    image = newest(make_vm(tmp_path, "vm", data))
    with decoders(kept_bytes=1 << 60, count=1) as found:
        assert isinstance(found.room(BLOCK_BYTES).obj, ctypes.Array)
    assert not caplog.records
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), limits[1]))
    try:
        with decoders(kept_bytes=1 << 60, count=1) as found:
            kept = [found.room(BLOCK_BYTES) for _ in range(4)]
            for place in kept:
                image.read_into(0, place)
                assert place == data
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "little memory" in caplog.text
    image.close()


def test_damage_is_told_as_if_there_were_none(tmp_path: Path, own: Counted) -> None:
    data = random.Random(1).randbytes(16 * FRAME)
    vm = make_vm(tmp_path, "vm", data)
    [pack] = vm.layout.packs.glob("*.pack")
    stored = bytearray(pack.read_bytes())
    stored[stored.index(data[5 * FRAME + 1000 : 5 * FRAME + 1064])] ^= 0xFF
    pack.write_bytes(stored)
    image = newest(vm)
    with pytest.raises(Corrupt) as caught:
        read(image, 0, 16)
    assert (caught.value.offset, caught.value.length) == (5 * FRAME, FRAME)
    assert own.refused
    own.done = 0
    assert read(image, 6, 10) == data[6 * FRAME :]
    assert read(image, 0, 5) == data[: 5 * FRAME]
    assert own.done == 2
    image.close()


def test_frames_are_checked_elsewhere(vm: Repository, own: Counted) -> None:
    image = newest(vm)
    assert image.check(0, FRAMES) == []
    assert (own.checked, own.refused) == (1, 0)
    assert image.check_all([(0, 1), (5, 2), (9, 1)]) == []
    assert (own.checked, own.refused) == (2, 0)
    assert image.check(0, FRAMES_MIN - 1) == []
    assert (own.checked, own.refused) == (2, 1)
    image.close()


def test_a_disk_in_many_pieces_is_checked_elsewhere(tmp_path: Path, own: Counted) -> None:
    """More pieces than a question has room for."""
    data = content(1000, seed=3)
    vm = make_vm(tmp_path, "vm", data)
    rng = random.Random(4)
    new = bytearray(data)
    for number in range(0, 1000, 2):
        new[number * FRAME : number * FRAME + 64] = rng.randbytes(64)
    add_revision(vm, bytes(new))
    image = newest(vm)
    assert image.check(0, 1000) == []
    assert own.checked > 4
    assert own.refused == 0
    image.close()


def test_damage_is_found_and_forgotten_as_if_there_were_none(tmp_path: Path, own: Counted) -> None:
    data = random.Random(1).randbytes(16 * FRAME)
    vm = make_vm(tmp_path, "vm", data)
    image = newest(vm)
    assert image.check(0, 16) == []
    [pack] = vm.layout.packs.glob("*.pack")
    at = pack.read_bytes().index(data[5 * FRAME + 1000 : 5 * FRAME + 1064])
    for expected in ([5], []):
        with open(pack, "r+b") as file:  # what both have open
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
        assert image.check(0, 16) == expected
        assert image.check_all([(0, 8), (9, 7)]) == expected
        assert bool(vm.damage()) == bool(expected)
    assert own.checked == 3
    image.close()


def test_each_is_started_when_there_is_work_for_it(vm: Repository) -> None:
    image = newest(vm)
    with decoders(count=2, at_once=False) as found:
        assert found.pids == []
        for _ in range(3):
            assert read(image, 0, 16) == LAST[: 16 * FRAME]
            assert len(found.pids) == 1
        with ThreadPoolExecutor(4) as pool:
            assert all(bad == [] for bad in pool.map(lambda _: image.check(0, 40), range(40)))
        assert len(found.pids) == 2
    image.close()


def test_packs_that_were_replaced(tmp_path: Path, own: Counted) -> None:
    first = random.Random(1).randbytes(16 * FRAME)
    vm = make_vm(tmp_path, "vm", first)
    assert read(newest(vm), 0, 16) == first
    for number in range(4):
        add_revision(vm, random.Random(number).randbytes(FRAME) + first[FRAME:])
    vm.remove([vm.revisions()[0].id])
    vm.gc()
    data = random.Random(3).randbytes(FRAME) + first[FRAME:]
    own.done = 0
    image = newest(vm)
    assert read(image, 0, 16) == data
    assert own.done
    image.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_was_killed(
    number: signal.Signals, vm: Repository, own: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    image = newest(vm)
    pids = list(own.pids)
    for pid in pids:
        os.kill(pid, number)
    for _ in range(4):
        assert read(image, 0, 16) == LAST[: 16 * FRAME]
    assert own.pids == []
    assert sum("is gone" in record.message for record in caplog.records) == 2
    assert not any(_lives(str(pid)) for pid in pids)
    image.close()


def test_the_lost_are_replaced(
    vm: Repository, own: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPLACED_S", 0.0)
    image = newest(vm)
    for _ in range(3):
        before = set(own.pids)
        for pid in before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _ in range(6):
            assert read(image, 0, 16) == LAST[: 16 * FRAME]
        assert len(own.pids) == 2
        assert set(own.pids) - before
        own.done = 0
        assert read(image, 0, 16) == LAST[: 16 * FRAME]
        assert own.done == 1
    image.close()


def test_without_a_fork_server_nobody_is_replaced(
    vm: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REPLACED_S", 0.0)
    image = newest(vm)
    before = children(os.getpid())
    with decoders(count=2) as found:
        [server] = children(os.getpid()) - before
        for pid in (int(server), *found.pids):
            os.kill(pid, signal.SIGKILL)
        for _ in range(4):
            assert read(image, 0, 16) == LAST[: 16 * FRAME]
        assert found.pids == []
        assert server not in children(os.getpid())  # no zombie
    assert caplog.text.count("no process to decode with") == 1
    image.close()


def test_their_processor_time_is_that_of_a_child(vm: Repository) -> None:
    image = newest(vm)
    before = _waited_for_s()
    with decoders(count=2) as found:
        while (spent := sum(map(_spent_s, found.pids))) < 0.1:
            with ThreadPoolExecutor(2) as pool:
                assert all(pool.map(lambda _: read(image, 0, 16) == LAST[: 16 * FRAME], range(8)))
        os.kill(found.pids[0], signal.SIGKILL)
    assert _waited_for_s() - before >= spent
    image.close()


def _spent_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _waited_for_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_one_that_does_not_answer(
    vm: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.2)
    data = random.Random(1).randbytes(16 * FRAME)
    image = newest(make_vm(tmp_path, "other", data))
    with decoders(count=1) as found:
        [pid] = found.pids
        os.kill(pid, signal.SIGSTOP)
        assert read(image, 0, 16) == data
        assert found.pids == []
    assert not Path(f"/proc/{pid}").exists()
    image.close()


def test_they_keep_nothing_open_and_little_in_memory(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(16 * FRAME)
    image = newest(make_vm(tmp_path, "vm", data))
    with decoders(count=1) as found:
        [pid] = found.pids
        assert read(image, 0, 16) == data
        packs = _open_packs(pid)
        assert len(packs) == 1
        deadline = time.monotonic() + 20
        while _open_packs(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _open_packs(pid)
        targets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        kinds = {target.split(":")[0].split(" ")[0] for target in targets}
        assert kinds == {os.devnull, "socket"}
    image.close()


def test_they_give_back_what_was_removed_while_they_are_busy(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(16 * FRAME)
    other = random.Random(2).randbytes(16 * FRAME)
    vm = make_vm(tmp_path, "vm", data, other)
    first, second = (vm.open_disk(record, "disk") for record in vm.revisions())
    with decoders(count=1) as found:
        [pid] = found.pids
        assert read(first, 0, 16) == data
        assert read(second, 0, 16) == other
        first.close()
        writer = Repository.open(vm.path)
        assert writer.remove([vm.revisions()[0].id]).removed
        assert writer.gc().removed_files == 1
        deadline = time.monotonic() + 20
        while len(_open_packs(pid)) != 1 and time.monotonic() < deadline:
            assert read(second, 0, 16) == other
            time.sleep(0.05)
        assert len(_open_packs(pid)) == 1
    second.close()


def _open_packs(pid: int) -> list[str]:
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return [link for link in links if ".pack" in link]


def test_they_end_with_their_owner() -> None:
    program = (
        "import os, time\n"
        "from backyfs.store.packs.decoders import decoders\n"
        "with decoders(count=2) as found:\n"
        "    children = open(f'/proc/self/task/{os.getpid()}/children').read()\n"
        "    print(*found.pids, children, flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        pids = owner.stdout.readline().split()
        owner.kill()
        assert owner.stdout.read() == ""  # nobody else has it open
    owner.wait()
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_lives(pid) for pid in pids)


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_none_on_a_single_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with decoders() as found:
        assert found.pids == []
    assert Library.decoders is None
