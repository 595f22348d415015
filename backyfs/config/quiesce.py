"""The section `quiesce` of a job: how the guest is made to hold still while snapshots are taken.

For instance `quiesce: {agent: /run/qemu/web01.agent, policy: prefer}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from backyfs.config.document import Document, Node
from backyfs.config.interval import format_interval
from backyfs.config.keys import (
    COMMAND,
    PATH,
    TEXTS,
    WAIT,
    Key,
    Kind,
    choice,
    read_section,
    section_schema,
)
from backyfs.model import Consistency


class Policy(StrEnum):
    """What a backup does without a frozen guest: fail, go on, or it never tries to freeze."""

    REQUIRE = "require"
    PREFER = "prefer"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Quiesce:
    """How to freeze a guest: by its agent (`agent`, a unix socket), by commands, or both.

    `mountpoints`: those the agent freezes (none: all). `consistency`: what a frozen guest is worth,
    filesystem or application. `freeze_timeout_s` bounds each freeze and each command;
    `frozen_limit_s` is how long the guest stays frozen at most. Seconds, 1 to WAIT_MAX.
    """

    policy: Policy = Policy.PREFER
    agent: Path | None = None
    mountpoints: tuple[str, ...] = ()
    freeze_command: tuple[str, ...] = ()
    thaw_command: tuple[str, ...] = ()
    consistency: Consistency = Consistency.FILESYSTEM
    freeze_timeout_s: int = 60
    frozen_limit_s: int = 10

    def as_plain(self) -> dict[str, Any]:
        """As it is written in YAML or JSON; what has its default is left out."""
        found = {name: getattr(self, key.argument) for name, key in KEYS.items()}
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: _plain(name, value)
            for name, value in found.items()
            if value != defaults[KEYS[name].argument] or name == "policy"
        }


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return format_interval(value) if KEYS[name].kind is WAIT else str(value)


KEYS: Mapping[str, Key] = {
    "policy": Key(
        choice(*Policy),
        "policy",
        "without a frozen guest: fail (require), go on and warn (prefer); or never freeze",
        "prefer",
    ),
    "agent": Key(PATH, "agent", "unix socket of the QEMU guest agent's channel", "none"),
    "mountpoints": Key(TEXTS, "mountpoints", "file systems that the agent freezes", "all"),
    "freeze-command": Key(COMMAND, "freeze_command", "run to freeze the guest", "none"),
    "thaw-command": Key(COMMAND, "thaw_command", "run to thaw the guest, always", "none"),
    "consistency": Key(
        choice(Consistency.FILESYSTEM, Consistency.APPLICATION),
        "consistency",
        "what a frozen guest is worth; application: hooks or commands see to that",
        "filesystem",
    ),
    "freeze-timeout": Key(
        WAIT, "freeze_timeout_s", "how long freezing, and each command, may take", "1m"
    ),
    "frozen-limit": Key(
        WAIT, "frozen_limit_s", "how long the guest may be frozen; then it is thawed", "10s"
    ),
}


def _read(document: Document, node: Node, what: str) -> Quiesce | None:
    """The section at `node`; problems are noted, and None is returned for a wrong one."""
    noted = len(document.problems)
    values = read_section(document, node, what, KEYS)
    if len(document.problems) > noted:
        return None
    if "policy" in values:
        values["policy"] = Policy(values["policy"])
    if "consistency" in values:
        values["consistency"] = Consistency(values["consistency"])
    quiesce = Quiesce(**values)
    if fault := _fault(quiesce):
        document.problem(node, fault)
        return None
    return quiesce


QUIESCE = Kind(_read, section_schema(KEYS))
"""The section as a value of a job."""


def _fault(quiesce: Quiesce) -> str:
    if bool(quiesce.freeze_command) != bool(quiesce.thaw_command):
        return "freeze-command and thaw-command: give both or none"
    if quiesce.mountpoints and not quiesce.agent:
        return "mountpoints are for the guest agent: give its socket as agent"
    if not quiesce.agent and not quiesce.freeze_command and quiesce.policy is not Policy.NEVER:
        return "quiesce has neither an agent nor commands: nothing says how to freeze"
    return ""
