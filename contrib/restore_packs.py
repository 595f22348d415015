#!/usr/bin/env python3
"""Rebuild a disk image from a backyfs `packs` directory, without backyfs.

    restore_packs.py DIRECTORY                         list the revisions
    restore_packs.py DIRECTORY REVISION DISK IMAGE     write the image (sparse)

Needs Python 3.9 or newer and the zstandard package; checks every frame where the blake3 package
is there too. The format: docs/format.md.
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
ENTRY = struct.Struct("<QIBBHHHI")  # offset, size, kind, depth, flags, base segment, -, base number


def check(data, expected, what):
    if blake3 is not None and blake3(data).digest() != expected:
        raise ValueError(f"{what} does not match its checksum")


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
    tail = file.seek(-16, os.SEEK_END)
    length, _, magic = struct.unpack("<II8s", file.read(16))
    if magic != b"bfs-end\n":
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


def restore(directory, revision, disk, target):
    record = json.loads((directory / "revisions" / f"{revision}.json").read_text())
    chosen = next(d for d in record["disks"] if d["name"] == disk)
    name, checksum = next(iter(chosen["files"].items()))
    data = (directory / "revisions" / name).read_bytes()
    check(data, bytes.fromhex(checksum), name)
    segments = {}
    for path in sorted((directory / "packs").glob("*.pack"))[::-1]:  # of twins the first counts
        try:
            segments.update(footer(path.open("rb")))
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
    with open(target, "wb") as image:
        for first, count, segment, number in extents(data):
            image.seek(first * FRAME)
            for index in range(count):
                image.write(segments[segment].frame(number + index, segments))
        image.truncate(chosen["size"])


def main(arguments):
    if len(arguments) == 4:
        restore(Path(arguments[0]), *arguments[1:])
    elif len(arguments) == 1:
        for path in sorted((Path(arguments[0]) / "revisions").glob("*.json")):
            print(path.stem, *(disk["name"] for disk in json.loads(path.read_text())["disks"]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
