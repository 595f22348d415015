"""What a run ended with: one line on stderr and an exit code; a traceback only for a bug.

Signals end a run like errors do: SIGTERM and SIGHUP raise Interrupted in the main thread, so that
every `with` and `finally` on the way out cleans up (the async commands: running.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple, TextIO

import click

from backyfs import signals
from backyfs.errors import BackyfsError, OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Interrupted(BaseException):
    """The operator or the system asked us to stop, by signal number `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Failure(NamedTuple):
    """Why a run failed: its exit code, what to tell the operator and what to do about it."""

    code: int
    message: str = ""
    hint: str = ""


dropped: list[int] = []
"""Signals whose exception Python dropped, where nothing can be raised: in a callback of the garbage
collector or of the import system. Who runs on looks here."""


def raise_on_signals() -> None:
    """Make the signals that end a run raise Interrupted in the main thread; SIGINT is Python's."""
    dropped.clear()
    sys.unraisablehook = _drop
    for number in signals.ending():
        if number != signal.SIGINT:
            signal.signal(number, _raise)


def raise_dropped() -> None:
    """Interrupted, if a signal came that could not end the run."""
    if dropped:
        raise Interrupted(dropped[0])


def _drop(unraisable: sys.UnraisableHookArgs) -> None:
    match unraisable.exc_value:
        case Interrupted(number=number):
            dropped.append(number)
        case KeyboardInterrupt():
            dropped.append(signal.SIGINT)
        case _:
            sys.__unraisablehook__(unraisable)


def _raise(number: int, _: FrameType | None) -> None:
    if number == signal.SIGHUP:  # shell and kernel both send it: clean up only once
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted(number)


def explain(error: BaseException) -> Failure | None:
    """What an error means to an operator; None for a bug."""
    leaves = list(_leaves(error))
    causes = (cause for leaf in leaves for cause in _causes(leaf))
    stop = [cause for cause in causes if isinstance(cause, Interrupted | KeyboardInterrupt)]
    if stop:
        return _explain_one(stop[0])
    found = [_explain_one(leaf) for leaf in leaves]
    if not found or None in found:
        return None
    # A nursery may collect the failure and what it caused elsewhere; ours say more than errno.
    return next(
        (f for f, leaf in zip(found, leaves, strict=True) if isinstance(leaf, BackyfsError)),
        found[0],
    )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on.

    Python 3.11 makes a RuntimeError of what is raised while a class comes to be (__set_name__), as
    a signal's exception may be during an import.
    """
    cause: BaseException | None = error
    seen: set[int] = set()  # an error may have been raised from itself
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _explain_one(error: BaseException) -> Failure | None:
    match error:
        case BackyfsError():
            return Failure(error.exit_code, error.message, error.hint)
        case Interrupted():
            return _stopped(error.number)
        case KeyboardInterrupt() | click.exceptions.Abort():
            return _stopped(signal.SIGINT)
        case click.ClickException():
            return _explain_click(error)
        case BrokenPipeError():
            return Failure(128 + signal.SIGPIPE)
        case OSError():
            if not _named(error) and _adrift():
                return Failure(1, "the current directory is gone", "change to another one")
            return Failure(14 if error.errno in NO_SPACE else 1, _os_message(error))
        case MemoryError():
            return Failure(1, "out of memory")
        case ModuleNotFoundError() if not (error.name or "backyfs").startswith("backyfs"):
            text = f"the Python library {error.name} is missing"
            return Failure(1, text, "install it, or see: backyfs doctor")
    return None


def _stopped(number: int) -> Failure:
    return Failure(128 + number, f"stopped by {signal.Signals(number).name}")


def _explain_click(error: click.ClickException) -> Failure:
    if not isinstance(error, click.UsageError):
        return Failure(error.exit_code, error.format_message())
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return Failure(2, "no command given", error.format_message())
    hint = f"see: {error.ctx.command_path} --help" if error.ctx else ""
    if isinstance(error, click.NoSuchOption) and error.option_name in ("-r", "--repo"):
        hint = _HINT_DIRECTORY if error.ctx and not error.ctx.parent else hint
    return Failure(2, error.format_message().replace("\n", " "), hint)


_HINT_DIRECTORY = "did you mean -b/--backup-dir? (-r names a revision, after the command)"


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {what}" if _named(error) else what


def _adrift() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _named(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes)


def report(error: BaseException, *, as_json: bool) -> int:
    """Print why the run ended; return the exit code. A bug prints its traceback and is 1.

    A further signal ends the process there and then: it would come out as a traceback.
    """
    signals.let_end()
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    found = explain(error)
    with _unbreakable():
        if found is None:
            import traceback

            traceback.print_exception(error)
            found = Failure(1, f"a bug: {type(error).__name__}: {error}", "please report it")
        _print(found, sys.stderr, as_json)
    return found.code


def _print(failure: Failure, stream: TextIO, as_json: bool) -> None:
    if as_json:
        value = {
            "message_type": "exit_error",
            "code": failure.code,
            "message": failure.message,
            "hint": failure.hint,
        }
        print(json.dumps(value), file=stream)
    elif failure.message:
        print(f"backyfs: {failure.message}", file=stream)
        if failure.hint:
            print(textwrap.indent(failure.hint, "  "), file=stream)


@contextlib.contextmanager
def _unbreakable() -> Iterator[None]:
    """Whatever stdout or stderr still hold must not make a second error at exit."""
    try:
        yield
        sys.stderr.flush()
        sys.stdout.flush()
    except (OSError, OutputError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        os.close(nowhere)
