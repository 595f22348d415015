"""What the daemon writes: its status for others to read, and its memory for its successor.

Both are small files that are replaced whole. The status has Backy's form, a list with one mapping
per job, and is written as JSON, which every YAML parser reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backyfs.engine.scheduling.jobs import Job
from backyfs.engine.scheduling.memory import Memory
from backyfs.store.fs import refuse_special

log = logging.getLogger(__name__)

MEMORY_NAME = ".scheduler.json"
"""The memory's name in the base directory."""

BYTES_MAX = 64 << 20

OK, TOO_OLD = "OK", "TOO OLD"


def row(job: Job) -> dict[str, Any]:
    """What is known of a job, as plain values; the keys are those of Backy, and ours."""
    last, plan = job.history.last, job.next()
    overdue = round(job.overdue_s(), 1) if job.known else 0.0
    return {
        "job": job.name,
        "sla": TOO_OLD if overdue else OK,
        "sla_overdue": overdue,
        "status": str(job.status),
        "last_time": iso(last.time) if last else None,
        "last_tags": ",".join(last.tags) if last else None,
        "last_duration": last.seconds if last else None,
        "next_time": None if job.running or job.queued else iso(plan.at),
        "next_tags": None if job.running else ",".join(plan.tags),
        "manual_tags": ", ".join(job.history.manual_tags),
        "quarantine_reports": job.quarantined,
        "revisions": job.history.count,
        "last_attempt": iso(job.memory.attempted) if job.memory.attempted else None,
        "last_code": job.memory.code if job.memory.attempted else None,
        "last_reason": job.memory.reason,
        "failures": job.memory.failures,
        "first_seen": iso(job.memory.first_seen),
        "tenant": job.config.tenant,
    }


def iso(wall: float) -> str:
    """A wall time as text: UTC, ISO 8601, seconds."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def write_status(path: Path, jobs: Iterable[Job]) -> None:
    """Replace the status file; readable for a monitoring user. OSError."""
    rows = [json.dumps(row(job), ensure_ascii=False) for job in jobs]
    _replace(path, "[" + ",\n ".join(rows) + "]\n", 0o644)


def read_status(path: Path) -> tuple[float, dict[str, dict[str, Any]]]:
    """When the status was written (wall time), and its rows by job; (0, {}) if there is none."""
    try:
        if not path.is_file():  # a FIFO would have us wait
            return 0.0, {}
        with open(path, "rb") as stream:
            written = os.fstat(stream.fileno()).st_mtime
            rows = json.loads(stream.read(BYTES_MAX))
        return written, {str(item["job"]): item for item in rows}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0.0, {}


def write_memories(base_dir: Path, memories: Mapping[str, Memory]) -> None:
    """Replace the memory in the base directory. OSError."""
    value = {name: memory.encode() for name, memory in sorted(memories.items())}
    text = json.dumps({"format": 1, "jobs": value}, indent=0, ensure_ascii=False)
    _replace(base_dir / MEMORY_NAME, text + "\n", 0o640)


def read_memories(base_dir: Path) -> dict[str, Memory]:
    """What a former scheduler remembered; nothing when there is none or it cannot be read."""
    try:
        with open(base_dir / MEMORY_NAME, "rb") as stream:
            value = json.loads(stream.read(BYTES_MAX))
        return {str(name): Memory.decode(item) for name, item in value["jobs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        log.warning("memory of the last scheduler is lost", {"reason": str(exc)})
        return {}


def _replace(path: Path, text: str, mode: int) -> None:
    """Readers see the old file or the new one; durability is not worth a wait of the disk."""
    refuse_special(path)
    tmp = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.tmp")
    try:
        # The name can be foretold: in a directory of all it must not lead elsewhere.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(tmp, flags, mode), "wb") as stream:
            with contextlib.suppress(PermissionError):  # a file system that has no modes
                os.fchmod(stream.fileno(), mode)
            stream.write(text.encode())  # UTF-8, whatever the locale has
        os.replace(tmp, path)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
