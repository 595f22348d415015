"""The global options of one run, and how a command gets at its repository."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backyfs.errors import NoRepository, UsageError

if TYPE_CHECKING:
    from backyfs.config.site import Site
    from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Session:
    """What the command line said before the command's name.

    `directory` is one VM's directory or the base directory of many; `config` the configuration of
    all jobs; `logfile` overrides where a command logs to.
    """

    directory: Path
    config: Path
    logfile: Path | None
    verbose: bool
    quiet: bool

    def at(self, directory: Path) -> Session:
        """The same options for another directory."""
        return replace(self, directory=directory)

    def repository(self) -> Repository:
        """The VM's repository in `directory`. NoRepository, Unsupported, Corrupt."""
        from backyfs.store.repository import Repository, is_repository

        if not self.directory.is_dir():
            raise NoRepository(f"no directory {self.directory}", hint=_how_to_make(self.directory))
        if is_repository(self.directory):
            return Repository.open(self.directory)
        vms = self.vms()
        if vms:
            raise NoRepository(
                f"{self.directory} is a base directory of {len(vms)} VMs, not a VM's directory",
                hint=f"name one of them, such as: backyfs -b {vms[0]} …",
            )
        raise _no_repository(self.directory)

    def has_site(self) -> bool:
        """Whether a configuration of all jobs is there, or named: `site` says if in vain."""
        from backyfs.config.site import DEFAULT_PATH

        return self.config != DEFAULT_PATH or self.config.exists()

    def site(self) -> Site:
        """The configuration of all jobs, sources included. ConfigError."""
        from backyfs.config.site import read_site
        from backyfs.source import registry

        return read_site(self.config, check_source=registry.make)

    @contextlib.contextmanager
    def logging(self, repository: Repository) -> Iterator[None]:
        """Log within, also to the VM's own file, and what ends it too soon: for commands that
        write to the repository, and those that may find damage.
        """
        from backyfs import log

        log.configure(
            verbose=self.verbose, quiet=self.quiet, as_json=_as_json(), logfile=self.logfile
        )
        try:
            with log.about(repository.name, repository.path), _failing(_command()):
                yield
        finally:
            log.shut_down()

    def vms(self) -> list[Path]:
        """The directories of VMs below a base directory, by name."""
        from backyfs.store.repository import may_be_repository

        return sorted(path for path in self.directory.iterdir() if may_be_repository(path))


def _command() -> str:
    context = click.get_current_context(silent=True)
    return (context.info_name if context else None) or "command"


def _as_json() -> bool:
    """Whether the command that runs was given --json."""
    context = click.get_current_context(silent=True)
    return bool(context and context.params.get("as_json"))


@contextlib.contextmanager
def _failing(command: str) -> Iterator[None]:
    """Log why what is within failed; the operator hears of it when the program ends."""
    from backyfs.cli import failure

    try:
        failure.raise_dropped()
        yield
    except BaseException as error:
        import logging

        from backyfs import log

        found = failure.explain(error) or failure.Failure(1, f"a bug: {error!r}")
        values = {"code": found.code, "reason": found.message}
        logging.getLogger(f"backyfs.cli.{command}").error("failed", values, extra=log.TOLD)
        raise


def _no_repository(directory: Path) -> NoRepository:
    """In a directory that is there."""
    from backyfs.store.identity import HINT_LOST, lost_in

    where = directory.resolve()
    if lost_in(where):
        return NoRepository(f"{where} has revisions, but no repository.json", hint=HINT_LOST)
    return NoRepository(f"no repository in {where}", hint=_how_to_make(directory))


def _how_to_make(directory: Path) -> str:
    return (
        "name a VM's directory with -b DIR (or BACKYFS_BACKUP_DIR); "
        f"make one with: backyfs -b {directory} init file IMAGE"
    )


def make_way(directory: Path) -> None:
    """Make the base for a new repository in `directory`, which must be absolute.

    UsageError when that would lie inside a repository or hold some itself; NoRepository.
    """
    from backyfs.store.repository import is_repository, may_be_repository

    for above in directory.parents:
        if is_repository(above):
            raise UsageError(f"{directory} lies in the repository {above}", hint=_HOW_TO_NAME)
    if directory.is_dir() and (inside := [p for p in directory.iterdir() if may_be_repository(p)]):
        raise UsageError(f"{directory} is a base directory of {len(inside)} VMs", hint=_HOW_TO_NAME)
    if directory.exists() and not directory.is_dir():
        raise NoRepository(f"{directory} is not a directory", hint=_HOW_TO_NAME)
    try:
        os.makedirs(directory.parent, 0o750, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise NoRepository(f"{exc.filename} is not a directory") from exc


_HOW_TO_NAME = "each VM has a directory of its own below a base directory: -b BASE/VM"
