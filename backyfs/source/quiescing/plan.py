"""What the guard is to do for one backup; also what the note on disk says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backyfs.config.keys import WAIT_MAX
from backyfs.config.quiesce import Policy, Quiesce
from backyfs.model import Consistency
from backyfs.source.quiescing.agent import ANSWER_S, GuestAgent
from backyfs.source.quiescing.commands import Commands
from backyfs.source.quiescing.contract import Quiescer

THAW_S = 120.0
"""How long thawing is tried, in seconds: an agent that is just freezing answers only afterwards."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Whose guest is to be frozen, for which revision ("" = for none: thawing only), and how.

    `directory` is the VM's. `thaw_s`: how long thawing is tried; `answer_s`: how long the agent may
    take to answer.
    """

    vm: str
    directory: Path
    quiesce: Quiesce
    revision: str = ""
    thaw_s: float = THAW_S
    answer_s: float = ANSWER_S

    def quiescers(self) -> list[Quiescer]:
        """In the order of freezing; thawing goes backwards."""
        quiesce, found = self.quiesce, list[Quiescer]()
        timeout_s = quiesce.freeze_timeout_s
        if quiesce.freeze_command:
            environment = {
                "BACKYFS_VM": self.vm,
                "BACKYFS_REVISION": self.revision,
                "BACKYFS_DIRECTORY": str(self.directory),
            }
            freeze, thaw = quiesce.freeze_command, quiesce.thaw_command
            found.append(Commands(freeze, thaw, environment, timeout_s))
        if quiesce.agent:
            found.append(GuestAgent(quiesce.agent, quiesce.mountpoints, timeout_s, self.answer_s))
        return found

    def encode(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self), default=str).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Plan:
        """The inverse of `encode`; ValueError when it is no plan."""
        try:
            value: dict[str, Any] = json.loads(data)
            told: dict[str, Any] = value.pop("quiesce")
            quiesce = Quiesce(
                Policy(told.pop("policy")),
                Path(agent) if (agent := told.pop("agent")) else None,
                tuple(map(str, told.pop("mountpoints"))),
                tuple(map(str, told.pop("freeze_command"))),
                tuple(map(str, told.pop("thaw_command"))),
                Consistency(told.pop("consistency")),
                **told,
            )
            plan = cls(str(value.pop("vm")), Path(value.pop("directory")), quiesce, **value)
        except (KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise ValueError(f"no plan: {exc}") from exc
        limits = quiesce.freeze_timeout_s, quiesce.frozen_limit_s
        for seconds in (plan.thaw_s, plan.answer_s, *limits):
            if type(seconds) not in (int, float) or not 0 <= seconds <= WAIT_MAX:
                raise ValueError(f"no plan: it is to wait {seconds!r:.40} seconds")
        return plan
