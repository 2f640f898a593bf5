"""Memory returns to the pool when nothing refers to it any more, and never before."""

import gc

import jax
import ml_dtypes
import numpy as np

from dpo_jax.data.load.buffer_pool import Pool


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_of_a_dropped_array_is_used_again() -> None:
    pool = Pool()
    first = pool.empty((8, 4), np.float32)
    assert (first.shape, first.dtype) == ((8, 4), np.float32)
    where = address(first)
    second = pool.empty((8, 4), np.float32)
    assert address(second) != where
    del first
    third = pool.empty((4, 16), ml_dtypes.bfloat16)  # the same number of bytes
    assert address(third) == where
    assert third.dtype == ml_dtypes.bfloat16
    assert pool.empty((3,), np.float32).nbytes == 12
    assert pool.empty((4, 0), np.float32).shape == (4, 0)


def test_a_view_keeps_the_memory() -> None:
    pool = Pool()
    array = pool.empty((8, 4), np.uint8)
    array[:] = 7
    view = array[2:3].reshape(-1)
    where = address(array)
    del array
    other = pool.empty((8, 4), np.uint8)
    other[:] = 9
    assert address(other) != where
    assert (view == 7).all()
    del view
    assert address(pool.empty((8, 4), np.uint8)) == where


def test_an_array_of_jax_keeps_the_memory() -> None:
    """On CPUs JAX does not copy an array with the right alignment."""
    pool = Pool()
    array = pool.empty((1024, 1024), np.float32)
    array[:] = 7
    on_device = jax.device_put(array)
    del array
    for _ in range(3):
        pool.empty((1024, 1024), np.float32)[:] = 9
    assert (on_device == 7).all()
    del on_device
    gc.collect()
    assert len(pool._free[4 * 2**20]) >= 1
