"""Reads the safetensors format lazily, and writes it one tensor at a time.

A file is the length of a JSON header (8 bytes, little endian), the header (name -> dtype, shape, byte offsets) and the
tensors' bytes. Reading maps the file into memory, so only the parts that are accessed are read from disk. bfloat16 is
supported; the official NumPy bindings read whole tensors and do not support bfloat16.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import pydantic
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, conform, decode_text, parse_json, what_it_is, writing
from dpo_jax.weights.finite import is_finite
from dpo_jax.weights.mapped_file import open_bytes

DTYPES = {  # in the order in which the safetensors library writes tensors
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
METADATA = "__metadata__"


MAX_HEADER_BYTES = 100 * 10**6
"""The limit that the format defines."""
Count = Annotated[int, pydantic.Field(ge=0, le=2**48)]


class Entry(pydantic.BaseModel):
    """The header's entry for one tensor."""

    dtype: str
    shape: Annotated[list[Count], pydantic.Field(max_length=16)]
    data_offsets: Annotated[list[Count], pydantic.Field(min_length=2, max_length=2)]
    """Offsets of its first byte and of the byte after its last, counted from the end of the header."""


Header = dict[str, Entry]


class NotFinite(UserError):
    """A tensor that was to be written is not finite.

    Attributes:
        name: name of the tensor in the file.
    """

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """Return every tensor of a file as a read-only view. Raises a UserError if the file is truncated or damaged."""
    data, header, _, start = _open(path)
    return {name: _view(data[start:], name, entry, path) for name, entry in header.items()}


def locate(path: epath.Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return (offset in the file, shape) of every tensor, to read parts without an open file; errors as in `read`."""
    data, header, _, start = _open(path)
    return {
        name: (start + entry.data_offsets[0], _view(data[start:], name, entry, path).shape)
        for name, entry in header.items()
    }


def read_metadata(path: epath.Path) -> dict[str, str]:
    """Return the file's metadata. Raises a UserError if the file is truncated or damaged."""
    return _open(path)[2]


def in_order(header: Mapping[str, tuple]) -> dict[str, tuple]:
    """Return the header of `write` in the order of the safetensors library, whose files are then the same bytes."""
    places = {dtype: place for place, dtype in enumerate(DTYPES.values())}
    return dict(sorted(header.items(), key=lambda item: (places[item[1][1]], item[0])))


def write(
    path: epath.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    header: Mapping[str, tuple],
    metadata: Mapping[str, str] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write `tensors`, consumed one at a time; `header` gives name -> (shape, dtype) in the same order.

    `metadata` is added to the file's metadata, which always says that the format is PyTorch's. Raises a UserError at a
    tensor with NaN or infinity, unless `allow_nonfinite`.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict = {METADATA: {"format": "pt"} | dict(metadata or {})}
    start = 0
    for name, (shape, dtype) in header.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with writing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            assert (tensor.shape, tensor.dtype) == header[name]
            if not allow_nonfinite and not is_finite(tensor):
                raise NotFinite(
                    f"{name} as {tensor.dtype} is not finite (NaN or infinity), so {path.name} is not written: the "
                    "model is damaged, or its numbers are too large for this dtype (then choose float32); "
                    "--allow_nonfinite exports it all the same",
                    name,
                )
            file.write(tensor.tobytes())


def _open(path: epath.Path) -> tuple[np.ndarray, Header, dict[str, str], int]:
    """Return the file's bytes, its header's entries, its metadata, and the offset where the tensors begin."""
    data = open_bytes(check_regular(path))
    length = int.from_bytes(data[:8].tobytes(), "little")
    start = 8 + length
    if not 2 <= length <= MAX_HEADER_BYTES or start > len(data) or data[8] not in b"{ ":
        known = what_it_is(data[:64].tobytes())
        raise UserError(
            f"{path} is {known}"
            if known
            else f"{path} is truncated or not a safetensors file: no header; copy it again"
        )
    text = decode_text(data[8:start].tobytes(), f"{path}: the header")
    entries: dict[str, Any] = conform(parse_json(text, f"{path}: the header"), dict[str, Any], f"{path}: the header")
    metadata: dict[str, str] = conform(entries.pop(METADATA, {}), dict[str, str], f"{path}: {METADATA}")
    header: Header = conform(entries, Header, f"{path}: the header")
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        first, end = entry.data_offsets
        if first != position or end < first:
            raise UserError(f"{path} is damaged: the bytes of {name} begin at {first}, not {position}; copy it again")
        position = end
    if len(data) != start + position:
        size = start + position
        raise UserError(f"{path} is truncated or damaged: {len(data)} bytes instead of {size}; copy it again")
    return data, header, metadata, start


def _view(data: np.ndarray, name: str, entry: Entry, path: epath.Path) -> np.ndarray:
    if entry.dtype not in DTYPES:
        raise UserError(
            f"{path}: {name} is stored as {entry.dtype}; supported are {', '.join(DTYPES)}, so use a copy of the model "
            "in one of these"
        )
    start, end = entry.data_offsets
    dtype, shape = DTYPES[entry.dtype], tuple(entry.shape)
    if end - start != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path} is damaged: {name} of shape {shape} has {end - start} bytes; copy it again")
    return data[start:end].view(dtype).reshape(shape)
