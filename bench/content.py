"""What generated disks hold: bytes that compress, repeat and differ as those of real disks do.

Pure: every byte follows from a seed and a block number. Only random(), getrandbits() and integer
arithmetic are used, so the bytes depend neither on libm nor on library functions whose algorithm
changes between versions of Python.

Mixture, by bytes: about 35 % zero, 25 % text, 25 % binary, 15 % incompressible; about 3 % of the
4 KiB pages repeat an earlier page (files that exist twice at any page, and some whole blocks).
"""

from __future__ import annotations

import array
import functools
import hashlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

PAGE = 4096
BLOCK = 4 << 20
PAGES_PER_BLOCK = BLOCK // PAGE

_POOL = 1 << 16  # entries of a pool: a random 16-bit number picks one
_MASTER = 3 << 20  # bytes of a master stream
_PIECE = 1 << 20  # longest piece of a file with one permutation of its bytes
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_CONSONANTS, _VOWELS = "tnrslhdcmfpgwybvkxjqz", "eaoiu"
_PUNCTUATION = (b", ", b". ", b" ", b" ", b" ", b"\n", b" (", b") ", b" = ", b"_", b".")
_SOURCE_PARTS = (
    *(b"    ", b"        ", b"(", b");\n", b"->", b"return ", b"if (", b") {\n", b"}\n"),
    *(b" = ", b" += ", b"self.", b"\n\n", b"/* ", b" */\n", b"0x%02x", b"NULL", b"int "),
    *(b"const char *", b"#include <", b".h>\n", b"for i in range(", b"):\n", b"import "),
)
_OPCODES = (0, 0xFF, 0x48, 0x8B, 0x89, 0x0F, 0xE8, 0x24)
# File sizes in pages: many small ones, few big ones.
_FILE_PAGES = (1, 1, 2, 2, 3, 4, 4, 6, 8, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_LOW_BITS = bytes(value & 7 for value in range(256))

Random = random.Random


def rng(*key: object) -> Random:
    """The random numbers that belong to `key`, and to nothing else."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Random(int.from_bytes(digest, "big"))


def _bytes(r: Random, length: int) -> bytes:
    return r.getrandbits(length * 8).to_bytes(length, "little") if length else b""


def _below(r: Random, limit: int) -> int:
    return int(r.random() * limit)


def _zipf(items: Sequence[bytes]) -> list[bytes]:
    """A pool in which the first of `items` is frequent and the last is rare."""
    weights = [1.0 / (rank + 2.7) for rank in range(len(items))]
    total = sum(weights)
    pool: list[bytes] = []
    reached = 0.0
    for item, weight in zip(items, weights, strict=True):
        reached += weight / total * _POOL
        while len(pool) < reached and len(pool) < _POOL:
            pool.append(item)
    return pool


def _picks(r: Random, pool: Sequence[bytes], count: int) -> Iterator[bytes]:
    """`count` entries of a pool, at the speed of C."""
    numbers = array.array("H", _bytes(r, 2 * count))
    if sys.byteorder == "big":
        numbers.byteswap()
    return map(pool.__getitem__, numbers)


def _fit(data: bytes, length: int) -> bytes:
    return data[:length] if len(data) >= length else data + bytes(length - len(data))


def _shuffled(r: Random, items: Iterable[int]) -> bytes:
    order = list(items)
    for i in range(len(order) - 1, 0, -1):
        j = _below(r, i + 1)
        order[i], order[j] = order[j], order[i]
    return bytes(order)


def _word(r: Random, rank: int) -> bytes:
    word = ""
    for _ in range(1 + int(r.random() * 2.2) + (rank > 300)):
        word += _CONSONANTS[int(r.random() * r.random() * len(_CONSONANTS))]
        word += _VOWELS[int(r.random() * r.random() * 5)]
        if r.random() < 0.45:
            word += _CONSONANTS[_below(r, len(_CONSONANTS))]
    return word.encode()


def _opcode(r: Random, rank: int) -> bytes:
    """Machine code: short ones are frequent; some carry random operands."""
    length = 2 + _below(r, 7) + (rank > 200) * 4
    code = bytearray(_bytes(r, length))
    for i in range(length):
        if r.random() < 0.40:
            code[i] = _OPCODES[_below(r, 8)]
    return bytes(code)


def _stamp(r: Random, number: int) -> bytes:
    day, hour, minute = 1 + number // 43200, number // 1800 % 24, number // 30 % 60
    return b"\nNov %02d %02d:%02d:%02d.%03d " % (
        *(day, hour, minute, number * 2 % 60),
        _below(r, 1000),
    )


def _tokens(r: Random, pool: Sequence[bytes], length: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size < length:
        parts.append(b"".join(_picks(r, pool, (length - size) // 6 + 64)))
        size += len(parts[-1])
    return _fit(b"".join(parts), length)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What all files of one template are made of.

    `masters` are streams by name; a file is a slice of one with its bytes permuted, so that two
    files share no content while each compresses as the master does. `skew` maps evenly spread
    bytes to an alphabet of about 5.5 bits.
    """

    masters: dict[str, bytes]
    skew: bytes


class _Words:
    """The words of a template; `next()` is one with what follows it in prose."""

    def __init__(self, r: Random) -> None:
        self._r = r
        self.pool = _zipf([_word(r, rank) for rank in range(9000)])

    def one(self) -> bytes:
        return self.pool[_below(self._r, _POOL)]

    def next(self) -> bytes:
        word = self.one()
        if self._r.random() < 0.86:
            return word + b" "
        return word + _PUNCTUATION[_below(self._r, len(_PUNCTUATION))]

    def phrase(self) -> bytes:
        first, second = self.next(), self.next()
        return first + second + (self.next() if self._r.random() < 0.5 else b"")


def _source_line(r: Random, words: _Words) -> bytes:
    return b"".join(
        _SOURCE_PARTS[_below(r, len(_SOURCE_PARTS))] if r.random() < 0.5 else words.one()
        for _ in range(1 + _below(r, 3))
    )


def _skewed_alphabet(r: Random) -> bytes:
    table = bytes(int(i / 256 * (i / 256) * (i / 256) * 255) for i in range(256))
    order = _shuffled(r, range(256))
    return bytes(order[value] for value in table)


@functools.lru_cache(maxsize=4)
def vocabulary(seed: int) -> Vocabulary:
    """The vocabulary of the template `seed`; takes about a second to make."""
    r = rng("vocab", seed)
    words = _Words(r)
    phrases = _zipf([words.phrase() for _ in range(12000)])
    # Half of the entries are two or three words long: natural text repeats phrases.
    prose = [words.next() if i % 2 else phrases[i] for i in range(_POOL)]
    source = _zipf([_source_line(r, words) for _ in range(20000)])
    stamps = [_stamp(r, number) for number in range(_POOL)]
    daemons = _zipf([_daemon(r, number) for number in range(300)])
    messages = _zipf([_message(r, words) for _ in range(400)])
    values = [b"%s=%d" % (words.one(), int(r.random() * r.random() * 1e6)) for _ in range(_POOL)]
    opcodes = _zipf([_opcode(r, rank) for rank in range(20000)])
    skew = _skewed_alphabet(r)
    masters = {
        "log": _log(r, stamps, (daemons, messages, values)),
        "prose": _tokens(r, prose, _MASTER),
        "source": _tokens(r, source, _MASTER),
        "code": _tokens(r, opcodes, _MASTER),
    }
    return Vocabulary(masters, skew)


def _daemon(r: Random, number: int) -> bytes:
    return b"vm%02d app%d[%d]: " % (_below(r, 20), number, _below(r, 30000))


def _message(r: Random, words: _Words) -> bytes:
    return b"".join(words.next() for _ in range(4 + _below(r, 6)))


def _log(r: Random, stamps: list[bytes], pools: Sequence[list[bytes]]) -> bytes:
    lines = _MASTER // 60
    columns = [_picks(r, pool, lines) for pool in pools]
    log = b"".join(itertools.chain.from_iterable(zip(itertools.cycle(stamps), *columns)))
    return (log * (_MASTER // len(log) + 1))[:_MASTER]


def _cut(r: Random, master: bytes, length: int, alphabet: bytes | range) -> bytes:
    """`length` bytes of a master stream, in pieces that each permute `alphabet` their own way."""
    parts: list[bytes] = []
    while length > 0:
        size = min(length, _PIECE)
        start = _below(r, _MASTER)
        piece = master[start : start + size]
        piece += master[: size - len(piece)]
        order = bytes(alphabet)
        parts.append(piece.translate(bytes.maketrans(order, _shuffled(r, order))))
        length -= size
    return b"".join(parts)


def _text(r: Random, words: Vocabulary, length: int) -> bytes:
    style = r.random()
    name = "prose" if style < 0.40 else "source" if style < 0.65 else "log"
    return _cut(r, words.masters[name], length, _LETTERS)


def _binary(r: Random, words: Vocabulary, length: int) -> bytes:
    style = r.random()
    if style < 0.30:
        return _cut(r, words.masters["code"], length, range(256))
    if style < 0.75:
        return _records(r, words, length)
    return _bytes(r, length).translate(words.skew)


def _records(r: Random, words: Vocabulary, length: int) -> bytes:
    """Records of 16 bytes: a counter, pointers, flags."""
    count = length // 16 + 1
    table = bytearray(count * 16)
    base = int(r.random() * 4e9)
    step = 1 + _below(r, 40)
    cycle = bytes((base + i * step) & 255 for i in range(256))
    table[0::16] = cycle * (count // 256) + cycle[: count % 256]
    for column in (1, 2, 8, 9):
        table[column::16] = _bytes(r, count)
    table[3::16] = bytes([base & 255]) * count
    for column in (4, 10, 11):
        table[column::16] = _bytes(r, count).translate(_LOW_BITS)
    for column in (12, 13):
        table[column::16] = _bytes(r, count).translate(words.skew)
    return bytes(table[:length])


def _incompressible(r: Random, words: Vocabulary, length: int) -> bytes:
    return _bytes(r, length)


Kind = Callable[[Random, Vocabulary, int], bytes]


def _kind(share: float, text: float, binary: float) -> Kind:
    return _text if share < text else _binary if share < binary else _incompressible


def _any_kind(r: Random) -> Kind:
    return _kind(r.random(), 0.385, 0.77)


def fresh(r: Random, words: Vocabulary, length: int) -> bytes:
    """What a running machine writes over old bytes: text, binary or incompressible."""
    return _kind(r.random(), 0.4, 0.8)(r, words, length)


def block(seed: int, number: int) -> bytes | None:
    """Block `number` (4 MiB) of the template `seed`; None when it is all zeros."""
    return _block(seed, number, copied=False)


def _block(seed: int, number: int, *, copied: bool) -> bytes | None:
    r = rng("block", seed, number)
    share = r.random()
    if share < 0.28 and number:
        return None
    if share < 0.31 and number and not copied:  # a copy of one of four blocks
        return _block(seed, -1 - _below(r, 4), copied=True)
    words = vocabulary(seed)
    if share < 0.55 and not copied:  # part of one big file
        return _any_kind(r)(r, words, BLOCK)
    parts = _block_group(r, words) if share < 0.60 else []
    parts.extend(_files(r, seed, words, PAGES_PER_BLOCK - sum(map(len, parts)) // PAGE))
    return b"".join(parts)[:BLOCK]


def _block_group(r: Random, words: Vocabulary) -> list[bytes]:
    """A file system's own data: bitmaps and an inode table."""
    bitmaps = b"\xff" * PAGE * 3 + _bytes(r, PAGE).translate(_LOW_BITS) + bytes(PAGE * 12)
    inodes = bytearray(256 * 1024)
    for column in (0, 4, 8, 12, 20, 40, 41):
        table = _LOW_BITS if column < 12 else words.skew
        inodes[column::256] = _bytes(r, 1024).translate(table)
    return [bitmaps, bytes(inodes)]


def _files(r: Random, seed: int, words: Vocabulary, pages_left: int) -> Iterator[bytes]:
    """Files and free space that fill `pages_left` pages."""
    while pages_left > 0:
        what = r.random()
        pages = min(pages_left, _FILE_PAGES[_below(r, len(_FILE_PAGES))])
        if what < 0.085:  # free space
            pages = min(pages_left, pages * 2)
            yield bytes(pages * PAGE)
        elif what < 0.215:
            data, length = _repeated_file(seed, _below(r, 24), words)
            pages = min(pages_left, length)
            yield _fit(data, pages * PAGE)
        else:
            slack = _below(r, PAGE)  # behind the end of a file its last page is zero
            size = pages * PAGE - (slack if pages < 16 else 0)
            yield _fit(_any_kind(r)(r, words, max(size, 64)), pages * PAGE)
        pages_left -= pages


def _repeated_file(seed: int, which: int, words: Vocabulary) -> tuple[bytes, int]:
    """A file that exists more than once, and the pages this copy of it takes."""
    r = rng("dup", seed, which)
    pages = 16 + _below(r, 80)
    kind = _any_kind(r)
    return kind(r, words, (16 + _below(r, 80)) * PAGE), pages
