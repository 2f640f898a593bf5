"""The safetensors format, read lazily and written one tensor at a time.

A file is the length of a JSON header (8 bytes, little endian), the header (name -> dtype, shape, byte offsets) and the
tensors' bytes. Reading maps the file into memory, so only what is looked at is read from disk, bfloat16 included; the
official NumPy bindings read whole tensors and know no bfloat16.
"""

import json
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from dpo_jax.files import writing
from dpo_jax.weights.mapped_file import open_bytes

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
METADATA = "__metadata__"


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as a read-only view. Raises ValueError for a truncated or damaged file, before any use."""
    data = open_bytes(path)
    header, header_end = _header(data, path)
    return {name: _view(data[header_end:], name, info, path) for name, info in header.items() if name != METADATA}


def locate(path: epath.Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(offset in the file, shape) of every tensor, to read parts without keeping the file open. Raises as `read`."""
    data = open_bytes(path)
    header, header_end = _header(data, path)
    shapes = {
        name: _view(data[header_end:], name, info, path).shape for name, info in header.items() if name != METADATA
    }
    return {name: (header_end + header[name]["data_offsets"][0], shape) for name, shape in shapes.items()}


def read_metadata(path: epath.Path) -> dict[str, str]:
    """What the file says about itself. Raises ValueError for a truncated or damaged file."""
    header, _ = _header(open_bytes(path), path)
    return header.get(METADATA, {})


def write(
    path: epath.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    header: Mapping[str, tuple],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `tensors`, consumed one at a time; `header` gives name -> (shape, dtype) in the same order.

    `metadata` is what the file says about itself, beside being PyTorch's.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict = {METADATA: {"format": "pt"} | dict(metadata or {})}
    start = 0
    for name, (shape, dtype) in header.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    with writing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            assert (tensor.shape, tensor.dtype) == header[name]
            file.write(tensor.tobytes())


def _header(data: np.ndarray, path: epath.Path) -> tuple[dict, int]:
    """The file's header, and where its tensors begin."""
    header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        if header_end > len(data):
            raise ValueError("the header ends after the file")
        header = json.loads(data[8:header_end].tobytes())
        ends = [info["data_offsets"][1] for name, info in header.items() if name != METADATA]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: no header; copy it again") from error
    expected = header_end + max(ends, default=0)
    if len(data) != expected:
        raise ValueError(f"{path} is truncated or damaged: {len(data)} bytes instead of {expected}; copy it again")
    return header, header_end


def _view(data: np.ndarray, name: str, info: dict, path: epath.Path) -> np.ndarray:
    if info["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name} is stored as {info['dtype']}; supported are {', '.join(DTYPES)}")
    start, end = info["data_offsets"]
    dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is damaged: {name} of shape {shape} has {end - start} bytes; copy it again")
    return data[start:end].view(dtype).reshape(shape)
