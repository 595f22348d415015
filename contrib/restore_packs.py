#!/usr/bin/env python3
"""Rebuild a disk image from a backyfs `packs` directory, without backyfs (docs/format.md).

    restore_packs.py DIRECTORY                         list the revisions
    restore_packs.py DIRECTORY REVISION DISK IMAGE     write the image (sparse)

Needs Python 3.9 and zstandard; with blake3 it proves what it writes. Exit code 1: not the disk.
"""

import json
import os
import struct
import sys
from pathlib import Path

try:
    import zstandard
    from blake3 import blake3
except ImportError as error:
    blake3 = None if "blake3" in f"{error.name}" else sys.exit(f"restore_packs: {error}")

BAD = OSError, ValueError, LookupError, RuntimeError, MemoryError, struct.error, zstandard.ZstdError
FRAME, ZERO = 65536, bytes(32)
ENTRY = struct.Struct("<QIBBHHHI")  # offset, size, kind, depth, flags, base segment, -, base number


def check(data, expected, what):
    if blake3 is not None and blake3(data).digest() != expected:
        raise ValueError(f"{what} does not match its checksum")


def digest(size, hashes):  # of a disk, from the hashes of its frames
    while hashes:
        groups = (hashes[at : at + 32768] for at in range(0, len(hashes), 32768))
        hashes = b"".join(blake3(group).digest() if any(group) else ZERO for group in groups)
        if len(hashes) == 32:
            break
    return blake3(b"bfs1" + struct.pack("<QI", size, FRAME) + (hashes or ZERO)).hexdigest()


def frame(segments, segment, number):  # and its hash
    file, names, entries_at, hashes_at = segments[segment]
    entry = os.pread(file.fileno(), ENTRY.size, entries_at + number * ENTRY.size)
    offset, size, kind, _, _, base, _, base_number = ENTRY.unpack(entry)
    below = frame(segments, names[base], base_number)[0] if kind == 2 else None
    patch = below and zstandard.ZstdCompressionDict(below, zstandard.DICT_TYPE_RAWCONTENT)
    decoder = zstandard.ZstdDecompressor(dict_data=patch)
    found = decoder.decompress(os.pread(file.fileno(), size, offset), max_output_size=FRAME)
    known = os.pread(file.fileno(), 32, hashes_at + number * 32)
    check(found, known, f"{segment}: frame {number}")
    return found, known


def footer(file):  # the segments of a pack file by name; its table ends the file
    tail = max(0, os.stat(file.fileno()).st_size - 16)
    length, _, magic = struct.unpack("<II8s", os.pread(file.fileno(), 16, tail))
    if magic != b"bfs-end\n" or length > min(tail, 1 << 23):
        raise ValueError(f"{file.name}: its table is damaged")
    data = os.pread(file.fileno(), length, tail - length)
    check(data[:-32], data[-32:], file.name)
    _, _, segments, names, _, _ = struct.unpack_from("<8sIIIIQ", data)
    name = [data[32 + i * 32 : 64 + i * 32].rstrip(b"\0").decode() for i in range(names)]
    descriptors = struct.iter_unpack("<IIQQQ32s", data[32 + names * 32 :][: segments * 64])
    return {name[i]: (file, name, d[3], d[4]) for i, d in enumerate(descriptors)}


def section(data, index):
    _, flags, offset, stored, length = struct.unpack_from("<IIQQQ", data, 128 + index * 32)
    body = data[offset : offset + stored]
    return zstandard.ZstdDecompressor().decompress(body, length) if flags & 1 else body


def extents(data):  # (frame of the disk, segment, number in it) of all that is not zeros
    names, columns, position = section(data, 0), section(data, 1), 0
    segment = [names[i : i + 32].rstrip(b"\0").decode() for i in range(0, len(names), 80)]
    values = struct.unpack(f"<{len(columns) // 4}I", columns)
    rows = len(values) // 4
    for gap, count, index, number in zip(*(values[i * rows : (i + 1) * rows] for i in range(4))):
        for at in range(count):
            yield position + gap + at, segment[index], number + at
        position += gap + count


def restore(directory, revision, disk, target):
    if unknown := json.loads((directory / "repository.json").read_text())["features"]["incompat"]:
        raise ValueError(f"{directory} has features unknown here: {unknown}")
    record = json.loads((directory / "revisions" / f"{revision}.json").read_text())
    disk = {entry["name"]: entry for entry in record["disks"]}[disk]
    size, ((name, checksum),), segments = disk["size"], disk["files"].items(), {}
    data, hashes = (directory / "revisions" / name).read_bytes(), bytearray(-(-size // FRAME) * 32)
    check(data, bytes.fromhex(checksum), name)
    for path in sorted((directory / "packs").glob("*.pack"))[::-1]:  # of twins the first counts
        try:
            segments.update(footer(path.open("rb")))
        except BAD as error:
            print(f"left out: {error}", file=sys.stderr)
    with open(target, "wb") as image:
        for at, segment, number in extents(data):
            found, hashes[at * 32 : (at + 1) * 32] = frame(segments, segment, number)
            image.seek(at * FRAME)
            image.write(found)
        image.truncate(size)
    if blake3 is None:
        print("nothing was checked: the blake3 package is missing", file=sys.stderr)
    elif digest(size, bytes(hashes)) != disk["digest"]:
        raise ValueError(f"{target} does not match the digest of {revision}")


try:
    if len(sys.argv) == 5:
        restore(Path(sys.argv[1]), *sys.argv[2:])
    elif len(sys.argv) != 2:
        sys.exit(__doc__)
    else:
        for path in sorted(Path(sys.argv[1], "revisions").resolve(strict=True).glob("*.json")):
            print(path.stem, *(disk["name"] for disk in json.loads(path.read_text())["disks"]))
except BAD as error:
    sys.exit(f"restore_packs: {type(error).__name__}: {error}")
