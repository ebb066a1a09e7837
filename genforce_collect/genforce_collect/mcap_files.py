"""MCAP files at the level of records: the locked output file, and finishing a torn one in place."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard
from mcap import records
from mcap.data_stream import ReadDataStream, RecordBuilder
from mcap.opcode import Opcode
from mcap.writer import MCAP0_MAGIC

from genforce_collect.errors import DataError

SESSION_KEY = "genforce"  # name of the metadata record that describes the session

_FOOTER_SIZE = 9 + 20 + 8  # record head, body, magic


class LockedFile:
    """An exclusive, unbuffered output file; its lock tells a live writer from a dead one."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._size = 0

    def write(self, data: bytes) -> int:
        """All of it, or OSError."""
        view = memoryview(data)
        while view:
            written = os.write(self._fd, view)
            self._size += written
            view = view[written:]
        return len(data)

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Give up the lock too."""
        os.close(self._fd)

    def sync(self) -> None:
        """Down to the disk."""
        os.fsync(self._fd)


class Summary(NamedTuple):
    """What stands at the end of a finished file."""

    schemas: dict[int, records.Schema]
    channels: dict[int, records.Channel]
    chunks: list[records.ChunkIndex]
    metadata: list[records.MetadataIndex]
    statistics: records.Statistics


def is_locked(stream: BinaryIO) -> bool:
    """Whether a living writer holds the file; if none does, the stream now does."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def is_finished(stream: BinaryIO) -> bool:
    """Whether the file ends with a footer."""
    size = stream.seek(0, os.SEEK_END)
    if size < _FOOTER_SIZE:
        return False
    stream.seek(-_FOOTER_SIZE, os.SEEK_END)
    end = stream.read()
    return end[0] == Opcode.FOOTER and end[-8:] == MCAP0_MAGIC


def require_finished(path: Path) -> None:
    """Raises `DataError` where the file's end is missing."""
    with path.open("rb") as stream:
        if not is_finished(stream):
            raise DataError(
                f"{path}: is torn; copy it again, or run genforce bag repair {path.parent}"
            )


def _record_heads(stream: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Opcode, offset and size of each whole record; leaves the stream behind the record's head."""
    size = stream.seek(0, os.SEEK_END)
    offset = len(MCAP0_MAGIC)
    while offset + 9 <= size:
        stream.seek(offset)
        opcode, length = struct.unpack("<BQ", stream.read(9))
        if opcode == 0 or offset + 9 + length > size:
            return
        yield opcode, offset, 9 + length
        offset += 9 + length


def finish_torn(stream: BinaryIO) -> tuple[int, int] | None:
    """Cut a torn file after its last whole chunk and write its summary.

    Returns the bytes cut and the number of unreadable chunks within; None, and nothing done, where
    the file has not even a header.
    """
    size = stream.seek(0, os.SEEK_END)
    schemas: dict[int, records.Schema] = {}
    channels: dict[int, records.Channel] = {}
    chunks: list[records.ChunkIndex] = []
    metadata: list[records.MetadataIndex] = []
    counts: dict[int, int] = {}
    last_entries: dict[int, list[tuple[int, int]]] = {}
    current: records.ChunkIndex | None = None
    end, damaged = 0, 0
    for opcode, offset, length in _record_heads(stream):
        if opcode in (Opcode.DATA_END, Opcode.FOOTER):
            break
        if opcode == Opcode.CHUNK:
            chunk = records.Chunk.read(ReadDataStream(BytesIO(stream.read(length - 9))))
            try:
                last_entries = _scan_chunk(chunk, schemas, channels)
            except (ValueError, struct.error, zstandard.ZstdError):
                damaged += 1
                current = None
            else:
                current = _chunk_index(chunk, offset, length)
                chunks.append(current)
                for channel, entries in last_entries.items():
                    counts[channel] = counts.get(channel, 0) + len(entries)
        elif opcode == Opcode.MESSAGE_INDEX:
            if current is not None:
                index = records.MessageIndex.read(ReadDataStream(BytesIO(stream.read(length - 9))))
                current.message_index_offsets[index.channel_id] = offset
                current.message_index_length += length
            continue
        elif opcode == Opcode.METADATA:
            name = records.Metadata.read(ReadDataStream(BytesIO(stream.read(length - 9)))).name
            metadata.append(records.MetadataIndex(offset, length, name))
        end = offset + length
    if end == 0:
        return None
    # The indexes after the last whole chunk may be torn: they are written anew.
    stream.seek(end)
    stream.truncate()
    builder = RecordBuilder()
    if current is not None and end == current.chunk_start_offset + current.chunk_length:
        current.message_index_offsets.clear()
        for channel, entries in last_entries.items():
            current.message_index_offsets[channel] = end + builder.count
            records.MessageIndex(channel, entries).write(builder)
        current.message_index_length = builder.count
    records.DataEnd(0).write(builder)
    stream.write(builder.end())
    statistics = records.Statistics(
        attachment_count=0,
        channel_count=len(channels),
        channel_message_counts=counts,
        chunk_count=len(chunks),
        message_count=sum(counts.values()),
        message_end_time=max((c.message_end_time for c in chunks), default=0),
        message_start_time=min((c.message_start_time for c in chunks), default=0),
        metadata_count=len(metadata),
        schema_count=len(schemas),
    )
    _write_summary(stream, Summary(schemas, channels, chunks, metadata, statistics))
    return max(0, size - end), damaged


def _scan_chunk(
    chunk: records.Chunk,
    schemas: dict[int, records.Schema],
    channels: dict[int, records.Channel],
) -> dict[int, list[tuple[int, int]]]:
    """Note the chunk's schemas and channels; returns (log time, offset) of its messages, by
    channel. Raises ValueError and its like where the chunk is damaged.
    """
    data = chunk.data
    if chunk.compression:
        data = zstandard.decompress(data, max_output_size=chunk.uncompressed_size)
    if chunk.uncompressed_crc and zlib.crc32(data) != chunk.uncompressed_crc:
        raise ValueError("checksum mismatch")
    entries: dict[int, list[tuple[int, int]]] = {}
    offset = 0
    while offset < len(data):
        opcode, length = struct.unpack_from("<BQ", data, offset)
        if opcode == Opcode.MESSAGE:
            channel, _, log_time = struct.unpack_from("<HIQ", data, offset + 9)
            entries.setdefault(channel, []).append((log_time, offset))
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
            body = ReadDataStream(BytesIO(data[offset + 9 : offset + 9 + length]))
            if opcode == Opcode.SCHEMA:
                schema = records.Schema.read(body)
                schemas[schema.id] = schema
            else:
                new = records.Channel.read(body)
                channels[new.id] = new
        offset += 9 + length
    return entries


def _chunk_index(chunk: records.Chunk, offset: int, length: int) -> records.ChunkIndex:
    return records.ChunkIndex(
        chunk_length=length,
        chunk_start_offset=offset,
        compression=chunk.compression,
        compressed_size=len(chunk.data),
        message_end_time=chunk.message_end_time,
        message_index_length=0,
        message_index_offsets={},
        message_start_time=chunk.message_start_time,
        uncompressed_size=chunk.uncompressed_size,
    )


def _write_summary(stream: BinaryIO, summary: Summary) -> None:
    start = stream.tell()
    builder = RecordBuilder()
    groups: list[tuple[Opcode, list[Any]]] = [
        (Opcode.SCHEMA, list(summary.schemas.values())),
        (Opcode.CHANNEL, list(summary.channels.values())),
        (Opcode.STATISTICS, [summary.statistics]),
        (Opcode.CHUNK_INDEX, summary.chunks),
        (Opcode.METADATA_INDEX, summary.metadata),
    ]
    offsets = []
    for opcode, group in groups:
        group_start = builder.count
        for record in group:
            record.write(builder)
        offsets.append(
            records.SummaryOffset(opcode, start + group_start, builder.count - group_start)
        )
    offset_start = start + builder.count
    for entry in offsets:
        entry.write(builder)
    data = builder.end()
    head = struct.pack("<BQQQ", Opcode.FOOTER, 20, start, offset_start)
    records.Footer(start, offset_start, zlib.crc32(head, zlib.crc32(data))).write(builder)
    stream.write(data + builder.end() + MCAP0_MAGIC)
    stream.flush()
    os.fsync(stream.fileno())


def read_summary(path: Path) -> Summary:
    """Summary of a finished file. Raises `DataError`."""
    readers: dict[int, Any] = {
        Opcode.SCHEMA: records.Schema,
        Opcode.CHANNEL: records.Channel,
        Opcode.CHUNK_INDEX: records.ChunkIndex,
        Opcode.METADATA_INDEX: records.MetadataIndex,
        Opcode.STATISTICS: records.Statistics,
    }
    found: dict[int, list[Any]] = {opcode: [] for opcode in readers}
    require_finished(path)
    with path.open("rb") as stream:
        stream.seek(-_FOOTER_SIZE + 9, os.SEEK_END)
        (start,) = struct.unpack("<Q", stream.read(8))
        stream.seek(start)
        while True:
            opcode, length = struct.unpack("<BQ", stream.read(9))
            if opcode == Opcode.FOOTER:
                break
            body = stream.read(length)
            if opcode in readers:
                found[opcode].append(readers[opcode].read(ReadDataStream(BytesIO(body))))
    return Summary(
        {schema.id: schema for schema in found[Opcode.SCHEMA]},
        {channel.id: channel for channel in found[Opcode.CHANNEL]},
        found[Opcode.CHUNK_INDEX],
        found[Opcode.METADATA_INDEX],
        found[Opcode.STATISTICS][0],
    )


def read_session(path: Path) -> dict[str, Any]:
    """Session metadata of a file, torn or not; later records add to earlier ones."""
    session: dict[str, Any] = {}
    with path.open("rb") as stream:
        for opcode, _, length in _record_heads(stream):
            if opcode == Opcode.METADATA:
                body = stream.read(length - 9)
                record = records.Metadata.read(ReadDataStream(BytesIO(body)))
                if record.name == SESSION_KEY:
                    session |= json.loads(record.metadata["session"])
    return session
