"""Log lines: their form, where they go, and that they never stop anything."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from backyfs import log
from backyfs.errors import ConfigError

logger = logging.getLogger("backyfs.engine.backup")


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    yield
    log.shut_down()


def test_a_line_in_a_file(tmp_path: Path) -> None:
    log.configure(logfile=tmp_path / "log")
    with log.about("web01"):
        logger.info("revision published", {"revision": "r1", "seconds": 0.25, "tags": "a b"})
    logger.debug("not shown")
    line = (tmp_path / "log").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \d+ INFO web01 engine\.backup "
        r'revision published revision=r1 seconds=0\.25 tags="a b"\n',
        line,
    )
    assert (tmp_path / "log").stat().st_mode & 0o007 == 0


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [
        (False, False, ["warning", "error"]),
        (False, True, ["error"]),
        (True, False, ["debug", "info", "warning", "error"]),
    ],
)
def test_what_stderr_shows(
    capsys: pytest.CaptureFixture[str], verbose: bool, quiet: bool, shown: list[str]
) -> None:
    log.configure(verbose=verbose, quiet=quiet)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "it is %s", "so")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"backyfs: {level}: it is so" for level in shown]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ('a"b', r'"a\"b"'),
        ("a\nb", r'"a\nb"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("größe", "größe"),
        (None, "-"),
        (1 / 3, "0.333333"),
        (12, "12"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert log.text_of(value) == text


def test_a_message_cannot_forge_a_line(tmp_path: Path) -> None:
    log.configure(logfile=tmp_path / "log")
    logger.info("bad name %s", "x\n2026-01-01T00:00:00Z 1 INFO all is well")
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_traceback_is_marked(tmp_path: Path) -> None:
    log.configure(logfile=tmp_path / "log", quiet=True)
    try:
        raise ValueError("odd")
    except ValueError:
        logger.warning("a bug", exc_info=True)
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("a bug")
    assert rest
    assert all(line.startswith("| ") for line in rest)


def test_each_vm_has_its_own_log(tmp_path: Path) -> None:
    log.configure()
    for vm in ("web01", "db01"):
        (tmp_path / vm).mkdir()
    with log.about("web01", tmp_path / "web01"), log.about("db01", tmp_path / "db01"):
        logger.info("inner")
    with log.about("web01", tmp_path / "web01"):
        logger.info("outer")
    assert "inner" in (tmp_path / "db01" / log.VM_LOG).read_text()
    lines = (tmp_path / "web01" / log.VM_LOG).read_text()
    assert "outer" in lines
    assert "inner" not in lines


async def test_the_vm_is_known_in_tasks_and_threads(tmp_path: Path) -> None:
    log.configure(logfile=tmp_path / "log")
    with log.about("web01"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, logger.info, "from a thread")
    assert " web01 engine.backup from a thread\n" in (tmp_path / "log").read_text()


def test_rotation(tmp_path: Path) -> None:
    log.configure(logfile=tmp_path / "log")
    logger.info("one")
    (tmp_path / "log").rename(tmp_path / "log.1")
    logger.info("two")
    assert (tmp_path / "log.1").read_text().endswith("one\n")
    assert (tmp_path / "log").read_text().endswith("two\n")


def test_a_log_file_that_was_asked_for_must_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the log file"):
        log.configure(logfile=tmp_path / "missing" / "log")


def test_a_failing_log_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    with log.about("web01", tmp_path / "missing"):
        logger.info("one")
        logger.info("two")
    assert capsys.readouterr().err.count("cannot log to") == 1


def test_appending_from_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    program = (
        "import logging, sys, pathlib; from backyfs import log\n"
        "log.configure(logfile=pathlib.Path(sys.argv[1]))\n"
        "for n in range(500): logging.getLogger('backyfs').info('x' * 200)\n"
    )
    command = [sys.executable, "-c", program, os.fspath(path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 1000
    assert all(line.endswith("x" * 200) for line in lines)


def test_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.FORMAT_VARIABLE, "json")
    log.configure(logfile=tmp_path / "log", quiet=True)
    with log.about("web01"):
        logger.info("revision published", {"revision": "r1", "time": 5, "path": tmp_path})
        try:
            raise ValueError("odd")
        except ValueError:
            logger.warning("a\nbug", exc_info=True)
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "pid": os.getpid(),
        "level": "info",
        "vm": "web01",
        "logger": "engine.backup",
        "event": "revision published",
        "revision": "r1",
        "time_": 5,
        "path": str(tmp_path),
    }
    assert second["event"] == "a\nbug"
    assert "ValueError: odd" in second["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_journal_gets_priorities(tmp_path: Path, form: str) -> None:
    """A file in the place of the journal's socket: what counts is that JOURNAL_STREAM names it."""
    program = (
        "import logging; from backyfs import log\n"
        "log.configure(); logger = logging.getLogger('backyfs.engine.backup')\n"
        "with log.about('web01'):\n"
        "    logger.debug('no'); logger.info('done', {'n': 1}); logger.warning('hm')\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: logger.exception('a bug')\n"
    )
    path = tmp_path / "journal"
    with open(path, "wb") as stream:
        status = os.fstat(stream.fileno())
        env = os.environ | {
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
            log.FORMAT_VARIABLE: form,
        }
        subprocess.run([sys.executable, "-c", program], stderr=stream, env=env, check=True)
    lines = path.read_text().splitlines()
    assert [line[:3] for line in lines[:3]] == ["<6>", "<4>", "<3>"]
    assert all(line.startswith("<3>") for line in lines[2:])
    if form == "text":
        assert lines[0] == "<6>web01 engine.backup done n=1"
        assert lines[3].startswith("<3>| ")
    else:
        assert json.loads(lines[0][3:])["n"] == 1
