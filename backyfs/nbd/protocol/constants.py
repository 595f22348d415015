"""The numbers of the NBD specification that this server knows, and its own limits."""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from typing import Final

# Handshake

SERVER_GREETING: Final = b"NBDMAGIC" + b"IHAVEOPT"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9


class HandshakeFlag(IntFlag):
    """What server and client say of themselves first; the client's have the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client may ask for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """Types of answers to an option; those from 2^31 on are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_TOO_BIG = 2**31 + 9


class Info(IntEnum):
    """What a client may want to know of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """What an export can do (transmission flags)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


BASE_ALLOCATION: Final = "base:allocation"
BASE_ALLOCATION_ID: Final = 1

# Transmission

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF


class Command(IntEnum):
    """What a client may request of an open export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3


class Chunk(IntEnum):
    """Types of the parts of a structured reply; those from 2^15 on are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


CHUNK_DONE: Final = 1
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

WIRE_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}
"""The specification's errors by ours; any other is an EIO."""

# Limits

STRING_BYTES_MAX: Final = 4096
"""Longest string of the protocol: names, descriptions, error texts."""
OPTION_BYTES_MAX: Final = 64 << 10
OPTIONS_MAX: Final = 64
OPTIONS_PER_NAME: Final = 4
"""How many more a client may send for each name it was told: `nbdinfo --list` asks about all."""
BLOCK_MIN: Final = 1
BLOCK_PREFERRED: Final = 64 << 10
PAYLOAD_BYTES_MAX: Final = 32 << 20
"""Most bytes one READ or WRITE may move."""
DESCRIPTORS_MAX: Final = 1 << 16
"""Extents in one answer to BLOCK_STATUS (the specification's bound is 2^20)."""


def wire_error(number: int) -> int:
    """The error of the specification for an errno."""
    return WIRE_ERRORS.get(number, 5)
