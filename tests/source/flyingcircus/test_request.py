"""Asking for a snapshot through Consul: what comes of it, and what is left there."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from backyfs.source.flyingcircus.agent import agent
from backyfs.source.flyingcircus.consul import Consul
from backyfs.source.flyingcircus.request import ask, withdraw_leftover
from tests.source.flyingcircus.consul import Store, serving
from tests.source.flyingcircus.hypervisor import Hypervisor

VM, OWN, NAME = "web01", "backy-0a1b2c3d-", "backy-0a1b2c3d-20261121T220112Z-7f3a"


class Disks:
    """Disks that know the names of their snapshots."""

    def __init__(self, *names: str) -> None:
        self.snapshots: dict[str, set[str]] = {name: set() for name in names}
        self.looked = 0

    def take(self, disk: str, name: str) -> bool:
        new = name not in self.snapshots[disk]
        self.snapshots[disk].add(name)
        return new

    def missing(self) -> list[str]:
        self.looked += 1
        return [disk for disk, names in self.snapshots.items() if NAME not in names]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    with serving(store) as address:
        yield address


@pytest.fixture
def disks() -> Disks:
    return Disks("root", "data")


def hypervisor(address: str, disks: Disks, *only: str, **options: Any) -> Hypervisor:
    taking = {
        disk: lambda name, disk=disk: disks.take(disk, name) for disk in only or disks.snapshots
    }
    return Hypervisor(address, VM, taking, **options)


def asked(address: str, disks: Disks, timeout_s: float = 60.0) -> str:
    consul = Consul(agent(address, environment={}))
    return ask(consul, VM, NAME, disks.missing, own=OWN, timeout_s=timeout_s)


def request(vm: str = VM, snapshot: str = NAME) -> bytes:
    return json.dumps({"vm": vm, "snapshot": snapshot}).encode()


# ---- the hypervisor answers ----------------------------------------------------------------------


@pytest.mark.parametrize("removes", [False, True], ids=["the key stays", "the key goes"])
@pytest.mark.parametrize("delay_s", [0.0, 1.5])
def test_it_takes_the_snapshot(
    address: str, store: Store, disks: Disks, removes: bool, delay_s: float
) -> None:
    with hypervisor(address, disks, removes=removes, delay_s=delay_s).running() as host:
        assert asked(address, disks) == ""
    assert host.events[:4] == ["freeze", "take root", "take data", "thaw"]
    assert store.below("") == {}
    key = next(call for call in store.calls if call.startswith("PUT "))
    assert key.removeprefix("PUT /v1/kv/snapshot/").count("-") == 4  # a uuid, as Backy's


def test_waiting_asks_seldom(address: str, store: Store, disks: Disks) -> None:
    with hypervisor(address, disks, delay_s=3.0).running():
        assert asked(address, disks) == ""
    queries = [call for call in store.calls if call.startswith("GET") and "recurse" not in call]
    assert len(queries) <= 6
    assert disks.looked <= 8


def test_requests_of_others_stay_and_are_no_obstacle(
    address: str, store: Store, disks: Disks
) -> None:
    foreign = {
        "snapshot/garbage": b"\x00\xff",
        "snapshot/empty": b"",
        "snapshot/list": b"[1]",
        "snapshot/deep": b"[" * 100_000,
        "snapshot/numbers": b'{"vm": 1, "snapshot": 2}',
        "snapshot/half": b'{"vm": "web01"}',
        "snapshot/null": b"null",
        "snapshot/other": request(vm="web02"),
        "snapshot/longer": request(vm="web01x"),
        "snapshot/backy": request(snapshot="backy-VmqohQ7hqLKcyV9yUBDXJq"),
        "snapshot/another repository": request(snapshot="backy-ffffffff-20261121T220112Z-7f3a"),
        "snapshots": request(),
        "elsewhere": request(),
    }
    for key, value in foreign.items():
        store.put(key, value)
    with hypervisor(address, disks).running():
        assert asked(address, disks) == ""
    assert store.below("") == foreign


# ---- it does not ---------------------------------------------------------------------------------


def test_it_is_dead(address: str, store: Store, disks: Disks) -> None:
    reason = asked(address, disks, 1.2)
    assert reason == "the hypervisor has taken no snapshot of root, data within 1.2 s"
    assert store.below("") == {}


def test_it_cannot_freeze(address: str, store: Store, disks: Disks) -> None:
    with hypervisor(address, disks, freezes=False, removes=True).running():
        reason = asked(address, disks)
    assert reason == "the request was taken away without a snapshot of root, data"
    assert store.below("") == {}


def test_it_takes_one_disk_of_two(address: str, store: Store, disks: Disks) -> None:
    with hypervisor(address, disks, "root", removes=True).running():
        reason = asked(address, disks)
    assert reason == "the request was taken away without a snapshot of data"
    assert store.below("") == {}


def test_it_takes_another_name(address: str, store: Store, disks: Disks) -> None:
    with hypervisor(address, disks, names=lambda name: f"{name}-keep").running():
        assert "no snapshot of root, data" in asked(address, disks, 1.2)
    assert store.below("") == {}


def test_it_is_done_while_the_request_is_withdrawn(
    address: str, store: Store, disks: Disks
) -> None:
    taken = threading.Event()

    def withdrawn() -> bool:
        return any(call.startswith("DELETE") for call in store.calls)

    def missing() -> list[str]:
        if withdrawn():  # the last look: see to it that the snapshot is there by now
            assert taken.wait(60)
        return disks.missing()

    def take_last(name: str) -> bool:
        new = disks.take("data", name)
        taken.set()
        return new

    host = hypervisor(address, disks, held=withdrawn)
    host.disks = {**host.disks, "data": take_last}
    with host.running():
        consul = Consul(agent(address, environment={}))
        assert ask(consul, VM, NAME, missing, own=OWN, timeout_s=1.5) == ""
    assert store.below("") == {}


# ---- Consul does not -----------------------------------------------------------------------------


def test_consul_is_down(disks: Disks) -> None:
    with serving(Store()) as address:
        pass
    assert "cannot be reached: Connection refused" in asked(address, disks)


def test_consul_has_no_leader(address: str, store: Store, disks: Disks) -> None:
    store.leader = False
    assert "answers 500: No cluster leader" in asked(address, disks)


def test_nothing_may_be_written(address: str, store: Store, disks: Disks) -> None:
    store.tokens = {"": "elsewhere/"}
    assert "answers 403: Permission denied" in asked(address, disks)


def test_consul_is_away_for_a_moment(
    store: Store, disks: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    """The request stands, and the hypervisor sees to it meanwhile."""
    with serving(store) as address:
        port = int(address.rsplit(":", 1)[1])
        waiting = threading.Thread(target=lambda: reasons.append(asked(address, disks)))
        reasons: list[str] = []
        waiting.start()
        patiently(lambda: store.below("snapshot/"))
    for disk in disks.snapshots:
        disks.take(disk, NAME)
    waiting.join(60)
    assert reasons == [""]
    (left,) = store.below("snapshot/")
    assert "left over until the next backup" in caplog.text
    with serving(store, port) as address:
        withdraw_leftover(Consul(agent(address, environment={})), VM, OWN)
    assert store.below("snapshot/") == {}
    assert left


def test_it_is_said_that_consul_went_away(store: Store, disks: Disks) -> None:
    with serving(store) as address:
        reasons: list[str] = []
        waiting = threading.Thread(target=lambda: reasons.append(asked(address, disks, 2.0)))
        waiting.start()
        patiently(lambda: store.below("snapshot/"))
    waiting.join(60)
    assert reasons[0].startswith("the hypervisor has taken no snapshot of root, data within 2 s; ")
    assert "Consul at http://127.0.0.1" in reasons[0]


# ---- what a killed run left ----------------------------------------------------------------------


def test_requests_that_were_left_over_go(
    address: str, store: Store, disks: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for n in range(3):
        store.put(f"snapshot/{n}", request(snapshot=f"{OWN}20261120T22011{n}Z-7f3a"))
    store.put("snapshot/garbage", b"{")
    asked(address, disks, 0.1)
    assert store.below("") == {"snapshot/garbage": b"{"}
    assert caplog.text.count("withdrawing a snapshot request that was left over") == 3
    (told,) = [record for record in caplog.records if "no snapshot requests" in record.message]
    assert told.args == {"keys": 1, "first": "snapshot/garbage"}


def test_a_request_that_is_another_by_now_stays(address: str, store: Store) -> None:
    """Between looking and deleting, somebody else has taken the key."""
    store.put("snapshot/x", request(snapshot=f"{OWN}old"))
    consul = Consul(agent(address, environment={}))
    delete, other = consul.delete, request(vm="web02")

    def deleting(key: str, *, modified: int = 0) -> bool:
        store.put(key, other)
        return delete(key, modified=modified)

    consul.delete = deleting  # type: ignore[method-assign]
    withdraw_leftover(consul, VM, OWN)
    assert store.below("") == {"snapshot/x": other}


def test_whatever_interrupts_waiting_the_request_goes(address: str, store: Store) -> None:
    def missing() -> list[str]:
        assert len(store.below("snapshot/")) == 1
        raise ZeroDivisionError

    consul = Consul(agent(address, environment={}))
    with pytest.raises(ZeroDivisionError):
        ask(consul, VM, NAME, missing, own=OWN, timeout_s=60)
    assert store.below("snapshot/") == {}


def patiently(look: Any) -> None:
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end
        time.sleep(0.01)
