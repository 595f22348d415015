#!/usr/bin/env python3
"""Rebuild a disk image from a backyfs `packs` directory, without backyfs.

    restore_packs.py DIRECTORY                         list the revisions
    restore_packs.py DIRECTORY REVISION DISK IMAGE     write the image (sparse)

Needs Python 3.9 or newer and the zstandard package. Where the blake3 package is there too, the
record, every frame and the digest of the disk are checked; without it nothing is, and a warning
says so. Exit code 1: the image is not the disk. The format: docs/format.md.
"""

import json
import os
import struct
import sys
from pathlib import Path

import zstandard

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

FRAME = 65536
ZERO = bytes(32)
ENTRY = struct.Struct("<QIBBHHHI")  # offset, size, kind, depth, flags, base segment, -, base number


def check(data, expected, what):
    if blake3 is not None and blake3(data).digest() != expected:
        raise ValueError(f"{what} does not match its checksum")


class Digest:
    """The digest of a disk, from the hashes of its frames in order."""

    def __init__(self):
        self.levels = [[]]

    def add(self, value, level=0):
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(value)
        if len(self.levels[level]) == 1024:
            self.fold(level)

    def fold(self, level):
        values, self.levels[level] = b"".join(self.levels[level]), []
        self.add(blake3(values).digest() if any(values) else ZERO, level + 1)

    def of(self, size):
        level = 0
        while size and (level == 0 or level + 1 < len(self.levels) or len(self.levels[level]) > 1):
            if self.levels[level]:
                self.fold(level)
            level += 1
        root = self.levels[level][0] if size else ZERO
        return blake3(b"bfs1" + struct.pack("<QI", size, FRAME) + root).digest()


def sealed(path):
    """A JSON file with its own checksum."""
    value = json.loads(path.read_text(encoding="utf-8"))
    checksum = bytes.fromhex(value.pop("blake3"))
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    check(text.encode(), checksum, path)
    return value


class Segment:
    """The frames one backup wrote, wherever a pack file keeps them now."""

    def __init__(self, file, names, descriptor):
        self.file, self.names = file, names
        self.count, _, _, self.entries_at, self.hashes_at, _ = descriptor

    def frame(self, number, segments):
        fd = self.file.fileno()
        entry = os.pread(fd, ENTRY.size, self.entries_at + number * ENTRY.size)
        offset, size, kind, _, _, base, _, base_number = ENTRY.unpack(entry)
        stored = os.pread(fd, size, offset)
        if kind == 1:
            frame = zstandard.ZstdDecompressor().decompress(stored, max_output_size=FRAME)
        elif kind == 2:
            below = segments[self.names[base]].frame(base_number, segments)
            patch = zstandard.ZstdCompressionDict(below, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            frame = zstandard.ZstdDecompressor(dict_data=patch).decompress(stored)
        else:
            raise ValueError(f"frame {number} has kind {kind}")
        check(frame, os.pread(fd, 32, self.hashes_at + number * 32), f"frame {number}")
        return frame


def footer(file):
    """The segments of a pack file by name; the table's footer stands at the file's end."""
    if os.fstat(file.fileno()).st_size < 16:
        raise ValueError(f"{file.name}: cut off")
    tail = file.seek(-16, os.SEEK_END)
    length, _, magic = struct.unpack("<II8s", file.read(16))
    if magic != b"bfs-end\n" or length > tail:
        raise ValueError(f"{file.name}: its table is damaged")
    data = os.pread(file.fileno(), length, tail - length)
    check(data[:-32], data[-32:], file.name)
    _, _, segments, names, _, _ = struct.unpack_from("<8sIIIIQ", data)
    name = [data[32 + i * 32 : 64 + i * 32].rstrip(b"\0").decode() for i in range(names)]
    descriptors = struct.iter_unpack("<IIQQQ32s", data[32 + names * 32 :][: segments * 64])
    return {name[i]: Segment(file, name, d) for i, d in enumerate(descriptors)}


def section(data, index):
    _, flags, offset, stored, length = struct.unpack_from("<IIQQQ", data, 128 + index * 32)
    body = data[offset : offset + stored]
    return zstandard.ZstdDecompressor().decompress(body, length) if flags & 1 else body


def extents(data):
    """(first frame, count, segment name, first number) for everything that is not zeros."""
    names, columns = section(data, 0), section(data, 1)
    segment = [names[i : i + 32].rstrip(b"\0").decode() for i in range(0, len(names), 80)]
    values = struct.unpack(f"<{len(columns) // 4}I", columns)
    position, rows = 0, len(values) // 4
    for gap, count, index, number in zip(*(values[i * rows : (i + 1) * rows] for i in range(4))):
        yield position + gap, count, segment[index], number
        position += gap + count


def understood(directory):
    """Refuse what this script would read wrongly: another format, an unknown feature."""
    repository = sealed(directory / "repository.json")
    kind = repository["format"], repository["store"], repository["frame"], repository["hash"]
    unknown = repository["features"]["incompat"]
    if kind != (1, "packs", FRAME, "blake3") or unknown:
        raise ValueError(f"{directory}: cannot read {kind} {unknown}")


def table(directory):
    """All segments by name; of twins the first pack counts."""
    segments = {}
    for path in sorted((directory / "packs").glob("*.pack"))[::-1]:
        try:
            segments.update(footer(path.open("rb")))
        except (ValueError, struct.error, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
    return segments


def restore(directory, revision, disk, target):
    understood(directory)
    record = sealed(directory / "revisions" / f"{revision}.json")
    chosen = {d["name"]: d for d in record["disks"]}[disk]
    name, checksum = next(iter(chosen["files"].items()))
    data = (directory / "revisions" / name).read_bytes()
    check(data, bytes.fromhex(checksum), name)
    segments, size, digest, position = table(directory), chosen["size"], Digest(), 0
    if struct.unpack_from("<Q", data, 64) != (size,):
        raise ValueError(f"{name} is of a disk of another size")
    with open(target, "wb") as image:
        for first, count, segment, number in extents(data):
            image.seek(first * FRAME)
            for index in range(count):
                frame = segments[segment].frame(number + index, segments)
                image.write(frame)
                if blake3 is not None:
                    for _ in range(position, first + index):
                        digest.add(ZERO)
                    digest.add(blake3(frame).digest())
                    position = first + index + 1
        image.truncate(size)
    if blake3 is None:
        print("nothing was checked: the blake3 package is missing", file=sys.stderr)
        return
    for _ in range(position, -(-size // FRAME)):
        digest.add(ZERO)
    if digest.of(size).hex() != chosen["digest"]:
        raise ValueError(f"{target} does not match the digest of {revision}/{disk}")


def show(directory):
    """List the revisions; whether all records could be read."""
    readable = True
    for path in sorted((directory / "revisions").glob("*.json")):
        try:
            print(path.stem, *(disk["name"] for disk in sealed(path)["disks"]))
        except FAILURES as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
            readable = False
    return readable


FAILURES = (OSError, ValueError, LookupError, TypeError, struct.error, zstandard.ZstdError)


def main(arguments):
    try:
        if len(arguments) == 4:
            restore(Path(arguments[0]), *arguments[1:])
        elif len(arguments) == 1:
            sys.exit(0 if show(Path(arguments[0])) else 1)
        else:
            sys.exit(__doc__)
    except FAILURES as error:
        sys.exit(f"restore_packs: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
