"""Damaged and hostile safetensors files, and the indexes of sharded ones: one sentence that names the file."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dpo_jax.weights import safetensors_file
from dpo_jax.weights.io import load_params, tensor_names, weight_files
from dpo_jax.weights.layout import ParamSpec

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> epath.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return epath.Path(path)


def changed(**fields: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | fields}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed(dtype=7), "a.dtype: input should be a valid string, not 7"),
        (changed(dtype="F4"), "a is stored as F4; supported are I64"),
        (changed(shape=None), "a.shape: input should be a valid list, not None"),
        (changed(shape=[-2]), "a.shape.0: input should be greater than or equal to 0, not -2"),
        (changed(shape=[2**63, 2**63]), "a.shape.0: input should be less than"),
        (changed(shape=[2**40, 2**40]), "is damaged: a of shape"),
        (changed(shape=[2.0]), "a.shape.0: input should be a valid integer, not 2.0"),
        (changed(data_offsets=[8, 0]), "is damaged: the bytes of a begin at 8, not 0"),
        (changed(data_offsets=[0]), "a.data_offsets: list should have at least 2 items"),
        (changed(data_offsets=[-8, 0]), "a.data_offsets.0: input should be greater"),
        (changed(data_offsets=[0, 4]), "is truncated or damaged: .* bytes instead of"),
        (GOOD | {"b": GOOD["a"]}, "is damaged: the bytes of b begin at 0, not 8"),
        (GOOD | {"b": {"dtype": "F32"}}, "b.shape: field required; b.data_offsets: field required"),
        (GOOD | {"__metadata__": {"x": 1}}, "__metadata__: x: input should be a valid string, not 1"),
        ([GOOD], "is truncated or not a safetensors file: no header"),
        (b"{", "is truncated or not a safetensors file: no header"),
        (b"{" * 100_000, r"the header is not valid JSON"),
        (b'{"a": NaN}', r"the header: a: input should be a valid dictionary or instance of Entry, not nan"),
        (b'{"\xff": 1}', r"the header, line 1 is not valid UTF-8"),
    ],
)
def test_damaged_headers(header: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=message) as error:
        safetensors_file.read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 200, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_another_length(length: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.safetensors.* is"):
        safetensors_file.read(write(tmp_path / "x.safetensors", GOOD, length=length))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bytes(300), "is nothing but zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>log in first</html>", "is a web page"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01.", "is a Python pickle"),
        (b"PK\x03\x04" + bytes(40), "is a zip archive"),
        (b"\x1f\x8b\x08" + bytes(40), "is a gzip archive"),
        (b"hello, this is some text of a page", "is truncated or not a safetensors file"),
    ],
)
def test_what_it_is_instead(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.safetensors {message}"):
        safetensors_file.read(epath.Path(tmp_path / "x.safetensors"))


def test_sizes_and_devices_take_no_time(tmp_path: Path) -> None:
    began = time.monotonic()
    huge = write(
        tmp_path / "huge.safetensors", {"a": {"dtype": "U8", "shape": [3 * 10**11], "data_offsets": [0, 3 * 10**11]}}
    )
    os.truncate(huge, huge.stat().length - 8 + 3 * 10**11)  # sparse: it takes no room
    assert safetensors_file.read(huge)["a"].shape == (3 * 10**11,)
    zeros = tmp_path / "zeros.safetensors"
    zeros.touch()
    os.truncate(zeros, 3 * 10**11)
    with pytest.raises(ValueError, match="nothing but zero bytes"):
        safetensors_file.read(epath.Path(zeros))
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            tensor_names(epath.Path(tmp_path / f"{name}.safetensors"))
    with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
        tensor_names(epath.Path("/dev/zero"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "weight_map: field required"),
        ("[]", "valid dictionary"),
        ('{"weight_map": {}}', "weight_map: dictionary should have at least 1 item"),
        ('{"weight_map": {"a": null}}', "weight_map.a: input should be a valid string, not None"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names '../x.safetensors', which is not a .safetensors file of"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        (r'{"weight_map": {"a": "..\\x.safetensors"}}', r"names '\.\.\\\\x\.safetensors'"),
        ('{"weight_map": {"a": "model.bin"}}', "names 'model.bin'"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ('{"weight_map": {"a": "x.saf', "is not valid JSON"),
    ],
)
def test_damaged_indexes(index: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(ValueError, match=rf"index.json.*{message}"):
        weight_files(epath.Path(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in "xy":
        save_file(
            {"b.bias": np.zeros(3, np.float32), shard: np.zeros(1, np.float32)}, tmp_path / f"{shard}.safetensors"
        )
    names = {"b.bias": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"1 tensors of .*y.safetensors are in another file of its folder too: b.bias"):
        load_params(tmp_path, {"b.bias": ParamSpec((3,), (0,))}, dtype="float32")
