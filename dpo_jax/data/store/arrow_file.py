"""Arrow files of a prepared data set, mapped into memory and checked, whoever wrote them."""

import struct
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa

from dpo_jax import files
from dpo_jax.errors import UserError

_RECORD_BATCH = 3
"""Number of this kind of message in Arrow's Message.fbs."""


def map_table(path: Path, schema: pa.Schema, again: str, optional: Collection[pa.Field] = ()) -> pa.Table:
    """Map an Arrow file into memory. Raise ValueError, with the remedy, for a damaged file or another schema.

    Args:
        optional: fields that may follow those of the schema, in this order.
    """
    try:
        mapped = pa.memory_map(str(files.check_regular(path)))
        reader = pa.ipc.open_file(mapped)
        names = reader.schema.names
        is_ours = reader.schema == pa.schema([*schema, *(field for field in optional if field.name in names)])
        if is_ours:
            _refuse_compressed(mapped)
            return reader.read_all()
    except (pa.ArrowException, OSError, struct.error, IndexError) as error:
        raise UserError(f"{path} is damaged ({files.why(path, error)}); {again}") from None
    raise UserError(f"{path} has another layout than this version of dpo_jax reads; {again}")


def _refuse_compressed(mapped: pa.MemoryMappedFile) -> None:
    """Raise ArrowInvalid if reading could take more memory than the file has bytes; dpo_jax writes no such files."""
    mapped.seek(0)
    messages = pa.ipc.MessageReader.open_stream(mapped.read_buffer().slice(8))  # after the magic bytes
    for message in messages:
        if message.type not in ("schema", "record batch") or _is_compressed(message.metadata):
            raise pa.ArrowInvalid("its columns are compressed or dictionary-encoded")


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Return whether a FlatBuffer of Arrow's Message.fbs says that the buffers of a record batch are compressed."""
    data = memoryview(metadata)

    def field(table: int, number: int) -> int:
        """Return the position of a table's field; 0 if it has none."""
        entries = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", data, entries)[0]:
            return 0
        offset = struct.unpack_from("<H", data, entries + 4 + 2 * number)[0]
        return table + offset if offset else 0

    def follow(position: int) -> int:
        return position + struct.unpack_from("<I", data, position)[0]

    message = follow(0)
    return data[field(message, 1)] == _RECORD_BATCH and bool(field(follow(field(message, 2)), 3))
