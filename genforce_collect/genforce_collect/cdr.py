"""Serialised messages (little-endian CDR) read and stamped as they are, for making message objects
of the fast streams would cost several times as much."""

from __future__ import annotations

import struct

from genforce_collect.clock import NS

_PREAMBLE = 4  # bytes before the content: how it is encoded
_STAMP = struct.Struct("<iI")  # s, ns


def stamp_of(data: bytes | memoryview) -> int:
    """Stamp (ns) of a message that begins with a header."""
    seconds, nanoseconds = _STAMP.unpack_from(data, _PREAMBLE)
    return int(seconds) * NS + int(nanoseconds)


def set_stamp(data: bytearray, stamp_ns: int) -> None:
    """Give a message that begins with a header another stamp (ns)."""
    _STAMP.pack_into(data, _PREAMBLE, *divmod(stamp_ns, NS))


def doubles_of(data: bytes | memoryview, count: int) -> tuple[float, ...]:
    """The first `count` doubles behind the header of such a message: of a WrenchStamped force and
    torque, of a PoseStamped position and quaternion."""
    (length,) = struct.unpack_from("<I", data, _PREAMBLE + _STAMP.size)
    text_end = _STAMP.size + 4 + length
    return struct.unpack_from(f"<{count}d", data, _PREAMBLE + -(-text_end // 8) * 8)
