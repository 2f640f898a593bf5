"""What is stored of a data set: the numbers that the models make, in the right places, once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from dpo_jax.data import images
from dpo_jax.data.images import View
from dpo_jax.data.store import latents
from dpo_jax.data.store.latents import CHECKSUM, StoredLatents, choose_views, with_checksums
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.encode.dataset import lines_on_lengths
from dpo_jax.encode.images import posterior_moments
from dpo_jax.encode.text import encode_text
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.training.encoding import encode_data
from dpo_jax.training.model import load_encoders, load_tokenizers_of, open_model

ROOT = Path(__file__).parents[2]
FIELDS = {"data.encoded_views": 3, "data.random_crop": True}
SEVERAL_FILES = 2**12
"""Bytes a file that spread the images and captions of `mixed_pairs` over several."""


def nothing(*_: object) -> None: ...


def moments_of(encodings: StoredLatents, image: int, view: int) -> np.ndarray:
    moments_hwC = np.empty(encodings.moments_shape(), ml_dtypes.bfloat16)
    encodings.read_moments(image, view, moments_hwC)
    return moments_hwC


def text_of(encodings: StoredLatents, caption: str) -> tuple[np.ndarray, np.ndarray]:
    context_LD, pooled_P = (np.empty(encodings.text_shapes[name], ml_dtypes.bfloat16) for name in ("context", "pooled"))
    encodings.read_text(caption, context_LD, pooled_P)
    return context_LD, pooled_P


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "FILE_BYTES", SEVERAL_FILES)


@pytest.fixture
def config(tiny_config, mixed_pairs: Path):
    def make(family: str, **fields: object):
        return tiny_config(family, **{"data.path": str(mixed_pairs)} | FIELDS | fields)

    return make


def test_views_are_the_centre_first_and_mirrored_in_turn() -> None:
    assert choose_views(2, random_crop=False, random_flip=True) == [View(), View(flip=True)]
    views = choose_views(5, random_crop=True, random_flip=True)
    assert views[0] == View()
    assert [view.flip for view in views] == [False, True, False, True, False]
    assert len({(view.top, view.left) for view in views[1:]}) == 4
    assert views[:3] == choose_views(3, random_crop=True, random_flip=True)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_stored_numbers_are_those_of_the_models(config, tmp_path: Path, family: str) -> None:
    config = config(family)
    said: list[str] = []
    folder = encode_data(config, 2, said.append, nothing)
    encodings, data = StoredLatents(folder), open_prepared(config.data.path)
    assert len(list(folder.glob("images-*.safetensors"))) > 2
    assert len(list(folder.glob("captions-*.safetensors"))) > 2
    pipeline = open_model(config, tmp_path)
    encoders, tokenizers = load_encoders(config, pipeline, Placement(make_mesh())), load_tokenizers_of(pipeline)

    def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
        """To bfloat16, up to what another batch size does to float32."""
        np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-5)

    seen = set()
    for position in range(len(data.images)):
        for number, view in enumerate(encodings.views):
            pixels, _ = images.fit(images.decode(data.images[position]), 32, view)
            pixels = pixels[:, ::-1] if view.flip else pixels
            expected = posterior_moments(pipeline.vae, encoders["vae"], jnp.asarray(pixels[None]))[0]
            moments = moments_of(encodings, position, number)
            assert_rounded(moments, expected)
            seen.add((pixels.tobytes(), moments.tobytes()))
    # An image that is square has two distinct views, any other has three.
    squares = int((data.sizes_I2[:, 0] == data.sizes_I2[:, 1]).sum())
    for i in range(2):
        assert len({both[i] for both in seen}) == 3 * len(data.images) - squares > 2 * len(data.images)
    captions = sorted({*data.records["caption"].to_pylist(), "mine", "yours", ""})
    for caption in captions:
        context_NLD, pooled_NP, _ = encode_text(pipeline, encoders, jnp.asarray(tokenizers([caption])))
        context_LD, pooled_P = text_of(encodings, caption)
        assert_rounded(context_LD, context_NLD[0])
        assert_rounded(pooled_P, pooled_NP[0])
        assert len(pooled_P) == (0 if family == "sd15" else pooled_NP.shape[1])
    assert len({text_of(encodings, caption)[0].tobytes() for caption in captions}) == len(captions)
    with pytest.raises(latents.DamagedLatents, match="has no caption 'no caption of the data set'"):
        text_of(encodings, "no caption of the data set")
    # What was said beforehand: rows and bytes, as the files then have them.
    size = sum(file.stat().st_size for file in folder.glob("images-*"))
    assert f"images       {len(data.images)} x " in said[0]
    assert f"captions     {len(captions)} x " in said[0]
    assert size == pytest.approx(len(data.images) * 3 * moments_of(encodings, 0, 0).nbytes, rel=0.1)


@pytest.mark.parametrize(("family", "length", "padding"), [("sd15", 0, 0), ("sd3", 256, 0), ("z_image", 512, -1)])
def test_a_summary_says_how_long_captions_are_where_users_choose_it(
    tmp_path: Path, family: str, length: int, padding: int
) -> None:
    write_random_model(family, tmp_path / "model")
    pipeline, captions = load_pipeline(tmp_path / "model", dtype="float32"), ["", "two red dogs", "a"]
    tokenizers = load_tokenizers_of(pipeline)
    longest = (tokenizers(captions)[:, -length:] != padding).sum(axis=1).max()
    assert lines_on_lengths(pipeline, tokenizers, captions) == [
        f"tokens       at most {longest} in a caption, of the {length} that are stored (data.text_length)"
    ] * (length > 0)


def test_the_files_open_in_pytorch(config) -> None:
    folder = encode_data(config("sd15"), 2, nothing, nothing)
    moments = safetensors.torch.load_file(folder / "images-00000.safetensors")["moments"]
    assert moments.dtype == torch.bfloat16
    ours = moments_of(StoredLatents(folder), 0, 2)
    np.testing.assert_array_equal(moments[0, 2].float().numpy(), ours.astype(np.float32))


def test_goes_on_with_the_files_that_are_missing(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the images; what was whole is not written again, and the bytes come out the same."""
    config = config("sd15")
    whole = encode_data(config, 2, nothing, nothing)
    expected = {file.name: file.read_bytes() for file in whole.iterdir()}
    last = moments_of(StoredLatents(whole), 13, 2)
    for file in whole.iterdir():
        file.unlink()
    written = []
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name == "images-00002.safetensors" and "images-00002.safetensors" not in written:
            written.append("images-00002.safetensors")
            raise KeyboardInterrupt
        if Path(target).suffix == ".safetensors":
            written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_data(config, 2, nothing, nothing)
    assert not (whole / "encoding.json").exists()
    with pytest.raises(FileNotFoundError, match="are not complete; continue with"):
        latents.open_latents(Path(config.data.path), json.loads(expected["encoding.json"])["facts"])
    before = list(written)
    said: list[str] = []
    assert encode_data(config, 2, said.append, nothing) == whole
    assert " done" in said[0]
    assert not set(before) & set(written[len(before) :]) - {"images-00002.safetensors"}
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == expected
    assert encode_data(config, 2, said.append, nothing) == whole  # finished: nothing is said
    assert len(said) == 1
    (whole / "encoding.json").unlink()
    monkeypatch.setattr(latents, "FILE_BYTES", 3 * SEVERAL_FILES)  # what lies there has other rows
    encodings = StoredLatents(encode_data(config, 2, said.append, nothing))
    encodings.check()
    np.testing.assert_array_equal(moments_of(encodings, 13, 2), last)


SCRIPT = """
import json, sys
import dpo_jax, jax
process, address, data, root = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, process)
from dpo_jax.cli import load_config
from dpo_jax.data.store import latents
from dpo_jax.training.encoding import encode_data
latents.FILE_BYTES = 2**12
config = load_config(f"{root}/configs/sd15.py:tiny")
config.data.path, config.data.encoded_views, config.data.random_crop = data, 3, True
filled = []
print(encode_data(config, 2, lambda text: None, lambda name, done, total: filled.append((name, total))))
print(json.dumps(sorted(set(filled))))
"""


def test_two_processes_of_two_devices_share_the_files(config, mixed_pairs: Path) -> None:
    whole = encode_data(config("sd15"), 2, nothing, nothing)
    expected = {file.name: safetensors.torch.load_file(file) for file in whole.glob("*.safetensors")}
    for file in whole.iterdir():
        file.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), address, str(mixed_pairs), str(ROOT)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].splitlines()[-2:] for process in processes]
    assert [output[0] for output in outputs] == [str(whole)] * 2
    shares = [dict(json.loads(output[1])) for output in outputs]
    for name, count in (("images", 14), ("captions", 9)):
        assert shares[0][name] + shares[1][name] == count
        assert min(shares[0][name], shares[1][name]) > 0
    found = {file.name: safetensors.torch.load_file(file) for file in whole.glob("*.safetensors")}
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        values = {key: value for key, value in found[name].items() if not key.endswith(CHECKSUM)}
        for key, value in values.items():  # two programs round differently on some CPUs
            torch.testing.assert_close(value, tensors[key], rtol=2**-7, atol=1e-5)
        own = with_checksums({key: value.view(torch.uint8).numpy() for key, value in values.items()})
        for key in tensors.keys() - values.keys():
            np.testing.assert_array_equal(found[name][key].numpy(), own[key])


def test_numbers_that_are_not_finite_are_never_stored(
    config, mixed_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_jax.encode.dataset.posterior_moments", lambda *args: posterior_moments(*args) / 0)
    with pytest.raises(ValueError, match=r"the moments of images 0 to \d+ are not finite.*; set vae_dtype"):
        encode_data(config("sd15"), 2, nothing, nothing)
    assert not list(mixed_pairs.glob("encoded/sd15-*/*images*"))


def test_a_full_disk_is_told_before_anything_is_written(
    config, mixed_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=12345))
    with pytest.raises(OSError, match=r"encodings need another [0-9.]+ KiB, but 12.06 KiB are free in .*; make room"):
        encode_data(config("sd15"), 2, nothing, nothing)
    assert not list(mixed_pairs.glob("encoded/sd15-*"))
