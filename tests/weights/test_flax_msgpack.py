"""The lazy reader of Flax msgpack against `flax.serialization`."""

import mmap
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import serialization

from dpo_jax.weights import flax_msgpack

random = np.random.default_rng(0)

TREE: dict[str, Any] = {
    "down_blocks_0": {
        "conv": {"kernel": random.standard_normal((3, 3, 2, 4)).astype(np.float32), "bias": np.zeros(4, np.float16)},
        "layers": [{"scale": np.arange(3.0)}, {"scale": random.standard_normal(70_000).astype(ml_dtypes.bfloat16)}],
    },
    "ids": np.arange(300, dtype=np.int64)[None],
    "empty": np.zeros((0, 5), np.float32),
    "number": np.float32(1.5),
    "scalar": np.array(2, np.int8),
    "flags": np.array([True, False]),
    "a name of more than thirty-one characters": np.ones((1, 200, 1), np.uint8),
    "wide": {str(i): np.full(i, i, np.float16) for i in range(20)},
    "unused": {},
}


def write(folder: Path, tree: Any) -> epath.Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(serialization.to_bytes(tree))
    return epath.Path(path)


def restored(path: epath.Path) -> dict[str, np.ndarray]:
    """What Flax itself reads, by dotted path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(serialization.msgpack_restore(path.read_bytes()))
    return {".".join(key.key for key in path): np.asarray(array) for path, array in leaves}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(ours[name], array)


def test_reads_what_flax_reads(tmp_path: Path) -> None:
    path = write(tmp_path, TREE)
    arrays = flax_msgpack.read(path)
    assert_same(arrays, restored(path))
    assert arrays["down_blocks_0.layers.1.scale"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("header", [b"\x81", b"\xde\0\x01", b"\xdf\0\0\0\x01"])
@pytest.mark.parametrize("name", [b"\xa1n", b"\xd9\x01n", b"\xd9\xc8" + b"n" * 200, b"\xda\x01\x2c" + b"n" * 300])
def test_every_length_of_maps_and_names(tmp_path: Path, header: bytes, name: bytes) -> None:
    path = epath.Path(tmp_path / "flax_model.msgpack")
    path.write_bytes(header + name + serialization.msgpack_serialize(np.arange(5)))
    assert_same(flax_msgpack.read(path), restored(path))


def test_views_of_the_file_and_not_copies(tmp_path: Path) -> None:
    for array in flax_msgpack.read(write(tmp_path, TREE)).values():
        assert not array.flags.writeable
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert isinstance(array.base, mmap.mmap)


def test_chunked_arrays_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    path = write(tmp_path, TREE)
    assert path.read_bytes().count(b"__msgpack_chunked_array__") > 3
    arrays = flax_msgpack.read(path)
    assert_same(arrays, restored(path))
    assert_same(arrays, restored(write(tmp_path, TREE)))


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path, {name: TREE[name] for name in ("empty", "number", "flags", "wide")})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"flax_model.msgpack is (truncated or not .*; copy it again|empty)$"):
            flax_msgpack.read(path)


@pytest.mark.parametrize(
    "damaged",
    [
        b"<html>not found</html>",
        b"\x80\x00",  # a byte too many
        b"\x05",
        b"\x90",
        b"\x81\xa1a\xc1",  # a code that msgpack never uses
        b"\x81\xa1\xff\x80",  # a name that is no UTF-8
        b"\x81\x80\x80",  # a map as a name
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",  # more names than anybody could wait for
        serialization.to_bytes({"a": 1 + 2j}),
        serialization.to_bytes({"a": np.zeros(3, np.float32)}).replace(b"float32", b"floatXX"),
        serialization.to_bytes({"a": np.zeros(3, np.float32)}).replace(b"\xa7float32", b"\xa6object\x00"),
        serialization.to_bytes({"a": np.zeros(3, np.float32)}).replace(b"float32", b"float16"),
        serialization.to_bytes({"a": np.zeros(3, np.float32)}).replace(b"\x91\x03", b"\x91\x04"),
    ],
    ids=range(14),
)
def test_damaged(tmp_path: Path, damaged: bytes) -> None:
    path = epath.Path(tmp_path / "flax_model.msgpack")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is truncated or not a Flax msgpack file|is a web page"):
        flax_msgpack.read(path)
