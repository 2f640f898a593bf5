"""Files of many GB as arrays of bytes that are read from disk only where they are accessed.

By default the kernel reads megabytes ahead of each access. If processes share a checkpoint, that is what the others
hold, so each process would read everything. Read-ahead is therefore turned off, and `fetch` reads tensors in large
pieces.
"""

import mmap
import os
from typing import Any

import numpy as np
from etils import epath

from dpo_jax.errors import UserError


def open_bytes(path: epath.Path) -> np.ndarray:
    """Return the file's bytes: mapped if the file system supports it, downloaded completely from a bucket."""
    if path.as_posix().startswith("gs:/"):
        return np.frombuffer(path.read_bytes(), np.uint8)
    if not path.stat().length:  # an empty file cannot be mapped
        return np.zeros(0, np.uint8)
    data = np.memmap(path, np.uint8, mode="r")
    assert isinstance(data.base, mmap.mmap)
    data.base.madvise(mmap.MADV_RANDOM)
    return data


def fetch(view: Any) -> np.ndarray:
    """Return a view of a mapped file, with any strides, as an array in memory; other arrays (also JAX's) as NumPy
    arrays.

    It reads the bytes from the view's first element to its last: if the view is contiguous in the file, no others.
    """
    if not isinstance(view, np.memmap) or view.filename is None:
        return np.asarray(view)
    whole: np.ndarray = view
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start, _ = np.lib.array_utils.byte_bounds(whole)
    first, end = np.lib.array_utils.byte_bounds(view)
    with open(view.filename, "rb", buffering=0) as file:
        _read_at_random(file.fileno())
        data = np.fromfile(file, np.uint8, count=end - first, offset=first - start)
    return np.ndarray(view.shape, view.dtype, data, offset=view.ctypes.data - first, strides=view.strides)


def read_into(path: os.PathLike, offset: int, out: np.ndarray) -> None:
    """Fill the contiguous array `out` with the bytes at `offset` of a file, and read no others.

    Raises a UserError if the file ends before.
    """
    into, done = out.reshape(-1).view(np.uint8).data, 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _read_at_random(descriptor)
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if not count:
                raise UserError(f"{path} has become shorter since it was opened")
            done += count
    finally:
        os.close(descriptor)


def _read_at_random(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):  # only on Linux, where read-ahead is the problem
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
