"""Files of many GB as arrays of bytes that are read from disk when and where they are looked at.

Left to itself the kernel reads ahead, megabytes beyond each look; where processes share a checkpoint, that is what the
others hold, and each would read all of it. So it is told not to, and tensors are read by `fetch`, in large pieces.
"""

import mmap
import os
from typing import Any

import numpy as np
from etils import epath

from dpo_jax.errors import UserError


def open_bytes(path: epath.Path) -> np.ndarray:
    """The file's bytes: mapped where the file system can, downloaded whole from a bucket."""
    if path.as_posix().startswith("gs:/"):
        return np.frombuffer(path.read_bytes(), np.uint8)
    if not path.stat().length:  # can't be mapped
        return np.zeros(0, np.uint8)
    data = np.memmap(path, np.uint8, mode="r")
    assert isinstance(data.base, mmap.mmap)
    data.base.madvise(mmap.MADV_RANDOM)
    return data


def fetch(view: Any) -> np.ndarray:
    """What `view`, of any strides, shows of a mapped file, in memory; any other array (also JAX's) as it is, in NumPy.

    Reads the bytes from its first element to its last: no others if it is contiguous in the file.
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
    """Fills the contiguous array `out` with the bytes at `offset` of a file, and reads no others."""
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
    if hasattr(os, "posix_fadvise"):  # Linux, where read-ahead is the problem
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
