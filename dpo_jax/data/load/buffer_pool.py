"""Memory of arrays that nobody holds any more, for the next ones of the same size.

The system hands out large arrays as empty pages, and filling these in takes a third of the time that decoding images
into them does.
"""

import math
import threading
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


class Pool:
    """`empty` as NumPy's, but with memory that comes back when the array and all its views are gone.

    Also those that JAX holds: on CPUs it doesn't copy an array, on others not at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.RLock()  # the last view may go in the middle of `empty`

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
    """What the views of a block are views of."""

    def __init__(self, block: np.ndarray):
        self.__array_interface__: dict[str, Any] = block.__array_interface__
