"""File systems that show one image and do nothing else: what mounts are compared with.

squashfuse and qemu's FUSE export decode compressed images in C; the C passthrough of this
directory hands out the bytes of a plain file. They are no backup programs.
"""

from __future__ import annotations

import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from bench.command import Command, command, run

SQUASHFUSE = "squashfuse zstd 128K"
QEMU = "qemu FUSE, qcow2 zstd"
PASSTHROUGH = "C passthrough"


class ImageFs(ABC):
    """One image of the disk in `home`, to be served."""

    name: str
    programs: tuple[str, ...]

    def __init__(self, home: Path, image: Path) -> None:
        self.home = home
        self.image = image

    @classmethod
    def present(cls) -> bool:
        """Whether all it needs is installed."""
        return all(map(shutil.which, cls.programs))

    @abstractmethod
    def prepare(self) -> None:
        """Make `home` and what is served in it; not measured."""

    def mountpoint(self, place: Path) -> Path:
        """Make what it is to be mounted on, at `place` or below."""
        place.mkdir(exist_ok=True)
        return place

    @abstractmethod
    def mount(self, mountpoint: Path) -> Command:
        """Serve the image at `mountpoint` until it is unmounted."""

    def mounted(self, mountpoint: Path) -> Path:
        """The image below a mountpoint."""
        return mountpoint / self.image.name

    def mount_steps(self) -> Sequence[Command]:
        """What a mount needs beyond `prepare`: nothing."""
        return ()


class Squashfuse(ImageFs):
    """A squashfs that holds the image, compressed like ours in blocks of 128 KiB."""

    name = SQUASHFUSE
    programs = ("mksquashfs", "squashfuse_ll")

    def prepare(self) -> None:
        self.home.mkdir(parents=True)
        how = ("-comp", "zstd", "-Xcompression-level", "1", "-b", "128K", "-quiet", "-no-progress")
        run([command("mksquashfs", self.image, self._file, *how)])

    def mount(self, mountpoint: Path) -> Command:
        return command("squashfuse_ll", "-f", self._file, mountpoint)

    @property
    def _file(self) -> Path:
        return self.home / "disk.sqfs"


class QemuFuse(ImageFs):
    """A compressed qcow2, decoded and exported by qemu's storage daemon."""

    name = QEMU
    programs = ("qemu-img", "qemu-storage-daemon")

    def prepare(self) -> None:
        self.home.mkdir(parents=True)
        how = ("-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd")
        run([command("qemu-img", "convert", *how, self.image, self._file)])

    def mountpoint(self, place: Path) -> Path:
        """A file: that is what qemu mounts on."""
        point = place.with_name("qemu.img")
        point.touch()
        return point

    def mount(self, mountpoint: Path) -> Command:
        file = f"driver=file,node-name=file,read-only=on,filename={self._file}"
        image = "driver=qcow2,node-name=image,read-only=on,file=file"
        export = f"type=fuse,id=export,node-name=image,mountpoint={mountpoint}"
        return command(
            *("qemu-storage-daemon", "--blockdev", file, "--blockdev", image, "--export", export)
        )

    def mounted(self, mountpoint: Path) -> Path:
        return mountpoint

    @property
    def _file(self) -> Path:
        return self.home / "disk.qcow2"


class Passthrough(ImageFs):
    """The directory that holds the image, through passthrough.c."""

    name = PASSTHROUGH
    programs = ("gcc", "pkg-config")
    _SOURCE = Path(__file__).with_name("passthrough.c")

    def __init__(self, home: Path, image: Path, *options: str) -> None:
        super().__init__(home, image)
        self._options: Sequence[str] = options

    def prepare(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        flags = self.home / "flags"
        query = command("pkg-config", "--cflags", "--libs", "fuse3")
        run([Command(query.argv, stdout=flags)])
        words = shlex.split(flags.read_text())
        run([command("gcc", "-O2", "-o", self._program, self._SOURCE, *words)])

    def mount(self, mountpoint: Path) -> Command:
        return command(self._program, self.image.parent, mountpoint, *self._options)

    @property
    def _program(self) -> Path:
        return self.home / "passthrough"


DECODERS: tuple[type[ImageFs], ...] = (Squashfuse, QemuFuse)
