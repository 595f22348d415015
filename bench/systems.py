"""The programs measured: how each backs up one disk image, restores it and mounts it.

Every program gets a home of its own with nothing of the user's configuration, is told to keep
its caches there, and runs with its defaults otherwise, except that none encrypts if it can be
avoided (restic cannot) and that progress is not printed.
"""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.command import Command, command, run


class System(ABC):
    """One program with one store in `home`, which backs up `image`."""

    name: str
    program: str

    def __init__(self, home: Path, image: Path) -> None:
        self.home = home
        self.image = image

    @classmethod
    def present(cls) -> bool:
        """Whether the program is installed."""
        return shutil.which(cls.program) is not None

    @abstractmethod
    def prepare(self) -> None:
        """Make `home` and an empty store in it; not measured."""

    @abstractmethod
    def backup(self) -> Command:
        """Back up the image as it is now."""

    def restore_null(self) -> Command | None:
        """Write the newest backup to standard output; None when the program cannot."""
        return None

    @abstractmethod
    def restore_file(self, target: Path) -> Command:
        """Restore the newest backup to a file below the empty directory `target`."""

    def restored(self, target: Path) -> Path:
        """The file that `restore_file` makes."""
        return target / self.image.name

    def mountpoint(self, place: Path) -> Path:
        """Make what it is to be mounted on, at `place`."""
        place.mkdir(exist_ok=True)
        return place

    @abstractmethod
    def mount(self, mountpoint: Path) -> Command:
        """Serve the newest backup at `mountpoint` until it is unmounted."""

    @abstractmethod
    def mounted(self, mountpoint: Path) -> Path:
        """The image below a mountpoint."""

    def mount_steps(self) -> Sequence[Command]:
        """What a mount needs beyond a backup; not measured."""
        return ()

    def remove(self) -> None:
        """Remove the store."""
        shutil.rmtree(self.home, ignore_errors=True)


def backyfs_program() -> str:
    """The backyfs that belongs to this interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name("backyfs")
    return str(beside) if beside.exists() else "backyfs"


class Backyfs(System):
    """backyfs; `store`, `verify` and `changes` (a file that lists them) are what is compared."""

    program = backyfs_program()

    def __init__(
        self, home: Path, image: Path, *, store: str = "packs", verify: bool = False
    ) -> None:
        super().__init__(home, image)
        self._store = store
        self._verify = verify
        self.changes: Path | None = None

    name = "backyfs"

    @property
    def directory(self) -> Path:
        """The directory of the VM."""
        return self.home / "vms" / "vm"

    def command(self, *arguments: str | Path) -> Command:
        """A backyfs command on the VM's directory."""
        return command(self.program, "-l", self.home / "log", "-b", self.directory, *arguments)

    def prepare(self) -> None:
        self.directory.parent.mkdir(parents=True)
        run([self.command("init", "--store", self._store, "file", self.image)])

    def backup(self) -> Command:
        verify = () if self._verify else ("--no-verify",)
        changes = ("--changes", self.changes) if self.changes else ()
        return self.command("backup", *verify, *changes)

    def restore_null(self) -> Command:
        return self.command("restore", "-r", "latest", "-")

    def restore_file(self, target: Path) -> Command:
        return self.command("restore", "-r", "latest", self.restored(target))

    def mount(self, mountpoint: Path) -> Command:
        base = self.directory.parent
        return command(
            *(self.program, "-l", self.home / "log", "-b", base),
            *("mount", "--foreground", mountpoint),
        )

    def mounted(self, mountpoint: Path) -> Path:
        return mountpoint / "vm" / "latest" / "disk.img"

    def nbd_server(self, port: int) -> Command:
        """Serve the revisions as block devices on a TCP port of the loopback."""
        return self.command("nbd-server", "-p", str(port))

    def gc(self) -> Command:
        """Collect garbage."""
        return self.command("gc")


class Restic(System):
    """restic; repository version 2 with its default compression; encrypts always."""

    name = program = "restic"

    @property
    def _env(self) -> Mapping[str, str]:
        return {
            "RESTIC_REPOSITORY": str(self.home / "repository"),
            "RESTIC_CACHE_DIR": str(self.home / "cache"),
            "RESTIC_PASSWORD": "bench",
        }

    def _command(self, *arguments: str | Path) -> Command:
        return Command((self.program, "--quiet", *map(str, arguments)), env=self._env)

    def prepare(self) -> None:
        self.home.mkdir(parents=True)
        run([self._command("init", "--repository-version", "2")])

    def backup(self) -> Command:
        return self._command("backup", self.image)

    def restore_null(self) -> Command:
        return self._command("dump", "latest", self.image)

    def restore_file(self, target: Path) -> Command:
        return self._command("restore", "latest", "--target", target)

    def restored(self, target: Path) -> Path:
        return target / self.image.relative_to("/")

    def mount(self, mountpoint: Path) -> Command:
        return self._command("mount", mountpoint)

    def mounted(self, mountpoint: Path) -> Path:
        return mountpoint / "snapshots" / "latest" / self.image.relative_to("/")


class Borg(System):
    """borg without encryption; its default chunker and compression."""

    name = program = "borg"

    def __init__(self, home: Path, image: Path) -> None:
        super().__init__(home, image)
        self._archives = 0

    @property
    def _env(self) -> Mapping[str, str]:
        return {
            "BORG_REPO": str(self.home / "repository"),
            "BORG_BASE_DIR": str(self.home),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def _command(self, *arguments: str | Path, cwd: Path | None = None) -> Command:
        return Command((self.program, *map(str, arguments)), env=self._env, cwd=cwd)

    @property
    def _newest(self) -> str:
        return f"::{self._archives}"

    @property
    def _stored_path(self) -> Path:
        return self.image.relative_to("/")

    def prepare(self) -> None:
        self.home.mkdir(parents=True)
        run([self._command("init", "--encryption", "none")])

    def backup(self) -> Command:
        self._archives += 1
        return self._command("create", self._newest, self.image)

    def restore_null(self) -> Command:
        return self._command("extract", "--stdout", self._newest, self._stored_path)

    def restore_file(self, target: Path) -> Command:
        return self._command("extract", "--sparse", self._newest, self._stored_path, cwd=target)

    def restored(self, target: Path) -> Path:
        return target / self._stored_path

    def mount(self, mountpoint: Path) -> Command:
        return self._command("mount", "--foreground", self._newest, mountpoint)

    def mounted(self, mountpoint: Path) -> Path:
        return mountpoint / self._stored_path


class Casync(System):
    """casync with its defaults. It cannot write to a pipe, and mounts directory trees only."""

    name = program = "casync"

    @property
    def _store(self) -> str:
        return f"--store={self.home / 'store.castr'}"

    def prepare(self) -> None:
        self.home.mkdir(parents=True)

    def backup(self) -> Command:
        return command(self.program, "make", self._store, self.home / "disk.caibx", self.image)

    def restore_file(self, target: Path) -> Command:
        index = self.home / "disk.caibx"
        return command(self.program, "extract", self._store, index, self.restored(target))

    def mount_steps(self) -> Sequence[Command]:
        tree = self.home / "tree.caidx"
        return [command(self.program, "make", self._store, tree, self.image.parent)]

    def mount(self, mountpoint: Path) -> Command:
        return command(self.program, "mount", self._store, self.home / "tree.caidx", mountpoint)

    def mounted(self, mountpoint: Path) -> Path:
        return mountpoint / self.image.name


PEERS: tuple[type[System], ...] = (Restic, Borg, Casync)


def versions() -> dict[str, str]:
    """First line of what each program says about its version, by name."""
    plain = ("zstd", "cp", "nbdkit", "nbdcopy", "fio", "qemu-nbd")
    programs = {name: name for name in plain} | {"backyfs": Backyfs.program}
    programs.update({peer.name: peer.program for peer in PEERS})
    return {name: _version(program) for name, program in programs.items() if shutil.which(program)}


def _version(program: str) -> str:
    flag = "version" if program == Restic.program else "--version"
    with os.popen(f"'{program}' {flag} 2>/dev/null") as answer:
        return (answer.readline() or "unknown").strip()
