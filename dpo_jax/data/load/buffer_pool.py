"""Reuses the memory of arrays that are no longer used for the next arrays of the same size.

The operating system hands out large arrays as empty pages; mapping these takes a third of the time of decoding images
into them.
"""

import math
import threading
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


class Pool:
    """NumPy's `empty`, with memory that returns to the pool when the array and all its views are gone.

    That includes the views that JAX holds: on CPUs it does not copy an array, on other devices not at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.RLock()  # the last view may be freed in the middle of `empty`

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            block = self._free[size].pop() if self._free[size] else np.empty(size, np.uint8)
        lease = _Lease(block)
        weakref.finalize(lease, self._give_back, block).atexit = False
        return np.asarray(lease).view(dtype).reshape(shape)

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._free[block.nbytes].append(block)


class _Lease:
    """The object whose lifetime is that of all views of a block."""

    def __init__(self, block: np.ndarray):
        self.__array_interface__: dict[str, Any] = block.__array_interface__
