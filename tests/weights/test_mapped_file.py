"""Parts of mapped files: the right bytes, and no others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dpo_jax.weights.mapped_file import fetch, open_bytes

VALUES = np.random.default_rng(0).standard_normal((6, 8, 10)).astype(np.float32)


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """VALUES in a file, at an offset that suits no dtype."""
    path = tmp_path / "weights"
    path.write_bytes(b"header " + VALUES.tobytes() + b" end")
    return open_bytes(epath.Path(path))[7:-4].view(np.float32).reshape(VALUES.shape)


@pytest.mark.parametrize(
    "part",
    [
        np.s_[:],
        np.s_[2:4],
        np.s_[:, 3:5],
        np.s_[..., 9:],
        np.s_[5, 7, 9:],
        np.s_[::2, ::-1],
        np.s_[3:3],
        np.s_[1:1, 2:2],
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)])
def test_fetches_what_the_view_shows(mapped: np.ndarray, part: slice, axes: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(fetch(mapped.transpose(axes)[part]), VALUES.transpose(axes)[part])


def test_reads_no_more_than_the_part(mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    from_file = np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda *args, **kwargs: sizes.append(kwargs["count"]) or from_file(*args, **kwargs)
    )
    fetched = fetch(mapped.T[:, :, 2:4])
    assert sizes == [2 * 8 * 10 * 4]
    assert not isinstance(fetched, np.memmap)


def test_what_is_in_memory_stays_as_it_is(mapped: np.ndarray) -> None:
    computed = mapped.copy()  # a memmap by type, but of no file
    assert fetch(computed).base is computed
    assert fetch(VALUES) is VALUES


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    assert open_bytes(epath.Path(tmp_path / "weights")).shape == (0,)


PLACE = """
import json, sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from dpo_jax import sharding
from dpo_jax.weights import io
from dpo_jax.weights.layout import ParamSpec
sharding.SMALL = 100
fetched, fetch = [], io.fetch
io.fetch = lambda view: fetched.append((view.shape, view.T.flags.c_contiguous)) or fetch(view)
specs = {"to_q.kernel": ParamSpec((20, 8), (1, 0)), "to_q.bias": ParamSpec((8,), (0,))}
params = io.load_params(sys.argv[1], specs, dtype="float32", sharding=sharding.Placement(sharding.make_mesh(2, 2)))
np.savez(sys.argv[2], **params)
print(json.dumps(fetched))
"""


def test_copies_on_several_devices_are_read_once(tmp_path: Path) -> None:
    # Devices are counted when JAX starts, so four of them need a process of their own.
    tensors = {"to_q.weight": VALUES.reshape(-1)[:160].reshape(8, 20), "to_q.bias": VALUES[0, :, 0].copy()}
    save_file(tensors, tmp_path / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", PLACE, tmp_path, tmp_path / "out.npz"],
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
    )
    # Two halves of the kernel, each in one piece, for four devices; the bias is small, and whole on each.
    assert json.loads(result.stdout) == [[[20, 4], True], [[20, 4], True], [[8], True]]
    params = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(params["to_q.kernel"], tensors["to_q.weight"].T)
    np.testing.assert_array_equal(params["to_q.bias"], tensors["to_q.bias"])
