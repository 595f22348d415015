"""Frames as they are stored: zstd, or a patch against the frame at the same place before.

Compressors are not thread-safe, so each thread has its own. A patch is zstd with the base frame as
raw-content dictionary (the idea of `zstd --patch-from`).
"""

from __future__ import annotations

import threading
from operator import eq

import zstandard

from backyfs.model import FRAME
from backyfs.store.contract import Buffer

DEAD, ZSTD, PATCH = 0, 1, 2
STORED_BYTES_MAX = 2 * FRAME
"""No frame is stored in more; an entry that says so is damaged."""
DEPTH_MAX = 4
PATCH_GAIN = 0.8
"""A patch is stored if it is smaller than this share of the plain frame."""
PATCH_SURE = 0.6
"""Up to this share of the chain's full frame a patch is taken without trying the plain one."""

_WORDS = slice(63, None, 128)
"""Of a frame's words of 8 bytes, those that are compared: one a KiB, not at the start of a block,
where headers are alike."""
_SAMPLES = (slice(FRAME // 4, FRAME // 4 + 32), slice(3 * FRAME // 4, 3 * FRAME // 4 + 32))
"""What of a base is looked for everywhere in a frame."""

_PLAIN = zstandard.ZstdCompressionParameters.from_level(
    1, source_size=FRAME, hash_log=16, write_content_size=True, write_checksum=False
)
_PATCH = zstandard.ZstdCompressionParameters.from_level(
    1,
    source_size=FRAME,
    dict_size=FRAME,
    min_match=5,  # 1.7 % smaller than the default on random 4 KiB changes, at equal speed
    write_content_size=True,
    write_checksum=False,
)
_thread = threading.local()


def compress(frame: Buffer) -> bytes:
    """A frame as one zstd frame that `zstd -d` can read."""
    try:
        compressor = _thread.compressor
    except AttributeError:
        compressor = zstandard.ZstdCompressor(compression_params=_PLAIN)
        _thread.compressor = compressor
    result: bytes = compressor.compress(frame)
    return result


def related(frame: bytes, base: bytes) -> bool:
    """Whether a patch is worth trying: some of `base` is in `frame`, in its place or moved.

    A patch between frames that have nothing in common takes longest (320 us and more; this takes
    3 to 30) and is never stored.
    """
    mine, theirs = (memoryview(data).cast("Q")[_WORDS].tolist() for data in (frame, base))
    return any(map(eq, mine, theirs)) or any(base[sample] in frame for sample in _SAMPLES)


def compress_patch(frame: Buffer, base: bytes) -> bytes:
    """A frame as zstd with `base` as raw dictionary."""
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=_PATCH)
    return compressor.compress(frame)


def decompress(stored: Buffer) -> bytes:
    """The frame in a plain zstd frame. ValueError when it is not exactly one frame's bytes."""
    return _decoded(_decompressor(), stored)


def decompress_into(stored: Buffer, place: memoryview) -> None:
    """As `decompress`, into `place`, which has room for exactly one frame."""
    try:
        # Into a place that has room for all of it zstd decodes in one pass, without a copy.
        count = _decompressor().stream_reader(stored).readinto(place)
    except zstandard.ZstdError as exc:
        raise ValueError(str(exc)) from exc
    if count != FRAME:
        raise ValueError(f"the frame has {count} bytes instead of {FRAME}")


def _decompressor() -> zstandard.ZstdDecompressor:
    """The calling thread's own."""
    try:
        decompressor: zstandard.ZstdDecompressor = _thread.decompressor
    except AttributeError:
        decompressor = _thread.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def decompress_patch(stored: Buffer, base: bytes) -> bytes:
    """The frame in a patch against `base`. ValueError as `decompress`."""
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return _decoded(zstandard.ZstdDecompressor(dict_data=dictionary), stored)


def _decoded(decompressor: zstandard.ZstdDecompressor, stored: Buffer) -> bytes:
    try:
        # The header decides how much memory is taken: look at it before trusting it.
        promised = zstandard.frame_content_size(stored)
        if promised != FRAME:
            raise ValueError(f"the frame has {promised} bytes instead of {FRAME}")
        return decompressor.decompress(stored)
    except zstandard.ZstdError as exc:
        raise ValueError(str(exc)) from exc
