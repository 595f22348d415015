"""What the scheduler remembers of a job that the repository does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

TIME_MAX = 1e11
"""Wall times from here on (the year 5138) are none."""


@dataclass(slots=True)
class Memory:
    """Wall times (0 = never) and counters of one job; losing them costs some extra attempts.

    `code` and `reason`: how the last attempt ended. `retry_at`: when to try again (0: as the
    schedule says). `first_seen`: when the job was first configured, for the SLA of a job that
    has no revision yet. `purged`, `verified`, `scrubbed`: when that was done, or counts as done:
    it is done again an interval later.
    """

    first_seen: float = 0.0
    attempted: float = 0.0
    code: int = 0
    reason: str = ""
    failures: int = 0
    retry_at: float = 0.0
    purged: float = 0.0
    verified: float = 0.0
    scrubbed: float = 0.0

    def encode(self) -> dict[str, Any]:
        """As plain values; what has its default is left out."""
        return {
            field.name: value
            for field, value in zip(fields(self), asdict(self).values(), strict=True)
            if value != field.default
        }

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Memory:
        """The inverse; what is missing, of another type or no time takes its default."""
        found = {
            field.name: value[field.name]
            for field in fields(cls)
            if _is_like(value.get(field.name), field.default)
        }
        return cls(**found)


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(default, float):
        return 0 <= value < TIME_MAX
    return isinstance(value, int)
