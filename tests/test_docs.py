"""What the documentation shows is true: its commands run, and print what it says they print.

In README.md and docs/operations.md, each block fenced as ```console is run, in order, one shell
per document, in a sandbox: /srv, /mnt and /var/lib are directories of it, 9000 is a port that is
free. A line beginning with `$ ` is a command (continued while it ends in a backslash), the lines
below it are its output; a line `…` stands for any number of lines. Ids, times, sizes and durations
differ from run to run and are compared by their form only. A comment `# exits 12` behind a command
is its exit code.

For the sandbox alone, HTML comments: `<!-- run: … -->` holds shell commands that are run unseen,
`<!-- needs: fuse -->` names parts, `<!-- not run -->` before a block leaves it out.

    python -m tests.test_docs FILE...       puts the real output into the documents
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest

from backyfs.errors import BackyfsError
from tests.filesystems import mounts_below, unmount
from tests.nbd.service import free_port
from tests.parts import require

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/operations.md"]
_SANDBOXED = re.compile(r"(?<![\w./-])(?=/(?:srv|mnt|var/lib)\b)")
_EXITS = re.compile(r"\s+# exits (\d+)$")
_MARK = "\x1e"
_PORT = "9000"

_VOLATILE = [
    (re.compile(r"\b\d{8}T\d{6}Z-[0-9a-z]{4}\b"), "REVISION"),
    (re.compile(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?Z?"), "TIME"),
    (re.compile(r"\b[A-Z][a-z]{2} [ \d]\d \d\d:\d\d\b"), "TIME"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "HASH"),
    (re.compile(r"(\b\d+ h )?(\b\d+ min )?\b\d+(\.\d+)? m?s\b|\b\d+ h \d+ min\b"), "DURATION"),
    (re.compile(r"\b\d+(\.\d+)? ?([KMGT]i?B?|bytes)(?!\w)"), "SIZE"),
    (re.compile(r"\b\d+(\.\d+)? ?%"), "PERCENT"),
    (re.compile(r"\b(offset|byte) \d+"), r"\1 OFFSET"),  # frames are stored as they get ready
    (re.compile(r"^ *\d+(?= +PERCENT)"), "BYTES"),  # how much a mkfs writes is its version's
    (re.compile(r"/dev/loop\d+"), "LOOP"),
    (re.compile(r"-{3,}"), "---"),
    (re.compile(r"\s+"), " "),
]


@dataclass
class Command:
    """One command of a document, where it stands, and what it is said to do."""

    text: str
    line: int
    exits: int = 0
    output: list[str] | None = field(default_factory=list)
    """Lines shown below it; None: not shown, not compared."""


def _commands(document: str) -> Iterator[Command]:
    lines = iter(enumerate(document.splitlines(), 1))
    run_next = True
    for number, line in lines:
        if line.startswith("<!-- run:"):
            hidden = line.removeprefix("<!-- run:")
            while "-->" not in hidden:
                hidden += "\n" + next(lines)[1]
            yield Command(hidden.partition("-->")[0], number, output=None)
        elif line == "<!-- not run -->":
            run_next = False
        elif line.startswith("```"):
            block = _block(lines)
            if line == "```console" and run_next:
                yield from _commands_of_block(block)
            run_next = True


def _block(lines: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    """The lines up to the end of a fenced block."""
    block = []
    for number, line in lines:
        if line == "```":
            break
        block.append((number, line))
    return block


def _commands_of_block(block: list[tuple[int, str]]) -> Iterator[Command]:
    command: Command | None = None
    for number, line in block:
        if command is not None and command.text.endswith("\\") and not command.output:
            command.text += "\n" + line
        elif line.startswith("$ "):
            if command is not None:
                yield _with_exit_code(command)
            command = Command(line[2:], number)
        elif command is not None and command.output is not None:
            command.output.append(line)
    if command is not None:
        yield _with_exit_code(command)


def _with_exit_code(command: Command) -> Command:
    found = _EXITS.search(command.text)
    if found:
        command.exits = int(found[1])
        command.text = command.text[: found.start()]
    return command


def _form(line: str) -> str:
    for pattern, word in _VOLATILE:
        line = pattern.sub(word, line)
    return line.strip()


def _matches(expected: list[str], actual: list[str]) -> bool:
    """Whether lines are alike in form; `…` matches any number of lines."""
    if not expected:
        return not actual
    if expected[0].strip() == "…":
        return any(_matches(expected[1:], actual[n:]) for n in range(len(actual) + 1))
    return bool(actual) and expected[0] == actual[0] and _matches(expected[1:], actual[1:])


def _run(commands: list[Command], sandbox: Path) -> list[tuple[int, list[str]]]:
    """Exit code and output of each command; all run in one shell."""
    port = str(free_port())

    def sandboxed(text: str) -> str:
        return _SANDBOXED.sub(str(sandbox), re.sub(rf"\b{_PORT}\b", port, text))

    script = "exec 2>&1\nset -o pipefail\n" + "".join(
        f"{{ {sandboxed(command.text)}\n}} </dev/null\nprintf '\\n{_MARK}%d\\n' $?\n"
        for command in commands
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "HOME": str(sandbox),
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=sandbox,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    results = []
    output: list[str] = []
    said = done.stdout.replace(str(sandbox), "").replace(f":{port}", f":{_PORT}")
    for line in said.split("\n"):
        if line.startswith(_MARK):
            while output and not output[-1].strip():
                output.pop()
            results.append((int(line[1:]), output))
            output = []
        else:
            output.append(line)
    return results


def _run_in_sandbox(commands: list[Command], sandbox: Path) -> list[tuple[int, list[str]]]:
    for directory in ("srv", "mnt", "var/lib"):
        (sandbox / directory).mkdir(parents=True)
    try:
        return _run(commands, sandbox)
    finally:
        for mountpoint in mounts_below(sandbox):
            unmount(mountpoint)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.timeout(300)
def test_the_commands_of_a_document(name: str, tmp_path: Path) -> None:
    document = (ROOT / name).read_text()
    for part in re.findall(r"<!-- needs: (\S+) -->", document):
        require(part, f"{name} shows it")
    commands = list(_commands(document))
    results = _run_in_sandbox(commands, tmp_path)
    for command, result in zip_longest(commands, results):
        assert command is not None
        assert result is not None, f"{name}:{command.line}: the shell ended here"
        code, output = result
        shown = "\n".join(output)
        where = f"{name}:{command.line}: {command.text}"
        assert code == command.exits, f"{where}\nexits {code}, not {command.exits}\n{shown}"
        if command.output is not None:
            expected = [_form(line) for line in command.output]
            assert _matches(expected, [_form(line) for line in output]), f"{where}\n{shown}"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_one_table_of_exit_codes() -> None:
    tables = [
        re.findall(r"^\| \d+ \|.*$", (ROOT / "docs" / name).read_text(), flags=re.MULTILINE)
        for name in ("cli.md", "operations.md")
    ]
    assert tables[0] == tables[1]
    assert {int(row.split("|")[1]) for row in tables[0]} >= _exit_codes(BackyfsError)


def _exit_codes(error: type[BackyfsError]) -> set[int]:
    return {error.exit_code}.union(*(_exit_codes(kind) for kind in error.__subclasses__()))


def _rewritten(document: str, sandbox: Path) -> str:
    """The document with the output that its commands really have (except where it has a `…`)."""
    commands = list(_commands(document))
    results = _run_in_sandbox(commands, sandbox)
    lines: list[str | None] = list(document.splitlines())
    for command, (code, output) in zip(commands, results, strict=True):
        if code != command.exits:
            print(f"line {command.line}: {command.text}: exits {code}\n", *output, sep="\n")
        if command.output is None or "…" in command.output:
            continue
        last = command.line - 1 + command.text.count("\n")
        lines[last + 1 : last + 1 + len(command.output)] = [None] * len(command.output)
        lines[last] = "\n".join([lines[last] or "", *output])
    return "\n".join(line for line in lines if line is not None) + "\n"


def main() -> None:
    """Rewrite the documents named on the command line."""
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as sandbox:
            path.write_text(_rewritten(path.read_text(), Path(sandbox)))


if __name__ == "__main__":
    main()
