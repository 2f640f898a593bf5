"""Training from latents that `prepare --encode` stored equals training from images."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.training.config import resolve
from dpo_jax.training.data import encoding_facts, make_inputs, open_training_batches
from dpo_jax.training.encoding import encode_data
from dpo_jax.training.experiment import build, compose, make_encode
from dpo_jax.training.model import load_encoders, make_placement, open_model
from dpo_jax.training.trainer import train

from ..array_checks import agrees


@pytest.fixture
def config(tiny_config, mixed_pairs: Path):
    """Two views per image: a run sees them as often as it would see random flips."""

    def make(family: str, **fields: object):
        defaults = {
            "data.path": str(mixed_pairs),
            "data.random_flip": True,
            "data.encoded_views": 2,
            "loss.beta": 100.0,
        }
        return tiny_config(family, **defaults | fields)

    return make


def encoded(config):
    encode_data(config, 2, lambda text: None, lambda *done: None)
    return config


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize(
    "family",
    ["sd15", "sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd35", "flux")), "zimage"],
)
def test_inputs_agree_to_bfloat16_rounding(config, tmp_path: Path, family: str) -> None:
    """Latents and conditioning of the same examples, with flips, dropped and own captions, and real sizes."""
    fields = {"data.size_conditioning": "real", "data.caption_dropout": 0.3, "data.batch_size": 8}
    config = encoded(config(family, **fields))
    pipeline, derived = open_model(config, tmp_path), resolve(config, device_count=1, process_count=1)
    placement = make_placement(config)
    encoders = load_encoders(config, pipeline, placement)
    encode = jax.jit(make_encode(pipeline, config.guidance))
    found = []
    for views in (2, 0):
        config.data.encoded_views = views
        with open_training_batches(config, derived, make_inputs(config, pipeline)) as batches:
            some = [next(batches) for _ in range(3)]
        keys = [jax.vmap(jax.random.key)(jnp.asarray(batch.index_B)) for batch in some]
        outputs = [encode(encoders if not views else {}, batch, k) for batch, k in zip(some, keys, strict=True)]
        found.append((outputs, [batch._replace(inputs=()) for batch in some]))
        planned = compose(config, derived, pipeline, placement).abstract_batch()
        for x, y in zip(jax.tree.leaves(planned), jax.tree.leaves(some[0]), strict=True):
            assert (x.shape[2:], x.dtype) == (y.shape[2:], y.dtype)
    (stored, of_stored), (fresh, of_fresh) = found
    for a, b in zip(jax.tree.leaves(of_stored), jax.tree.leaves(of_fresh), strict=True):
        np.testing.assert_array_equal(a, b)
    for (latents, conditioning), (expected_latents, expected_conditioning) in zip(stored, fresh, strict=True):
        for a, b in zip(jax.tree.leaves(conditioning), jax.tree.leaves(expected_conditioning), strict=True):
            np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-5)
        # The error of mean and log variance, each of relative 2^-9; a posterior's deviation is around 1.
        np.testing.assert_allclose(latents, expected_latents, atol=0.02 * np.abs(expected_latents).max())
        assert not np.array_equal(latents, expected_latents)
    sizes = np.concatenate([batch.size_cond_BK6[..., :4].reshape(-1, 4) for batch in of_stored])
    assert len({tuple(size) for size in sizes}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd35", "flux", "zimage"])
def test_losses_agree(config, tmp_path: Path, family: str) -> None:
    fields = {"optimizer.learning_rate": 1e-4, "lora.rank": 0, "lora.alpha": 0.0}
    train(encoded(config(family, **fields)), tmp_path / "stored")
    train(config(family, **fields, **{"data.encoded_views": 0}), tmp_path / "fresh")
    ours, expected = losses(tmp_path / "stored"), losses(tmp_path / "fresh")
    assert abs(expected[-1] - expected[0]) > 0.01
    np.testing.assert_allclose(ours, expected, rtol=5e-3)
    assert ours != expected


def test_neither_vae_nor_text_encoder_is_in_memory(config, no_network, tmp_path: Path) -> None:
    """The VAE and the text encoders are loaded only while samples are drawn."""
    stored = encoded(config("sd15", **{"validation.every": 4, "sample.every": 4}))
    train(stored, tmp_path / "stored")
    assert np.isfinite(losses(tmp_path / "stored")).all()
    assert (tmp_path / "stored" / "samples" / "step_000004.png").exists()

    pipeline = open_model(stored, tmp_path)
    before = {id(x) for x in jax.live_arrays()}
    experiment = build(stored, resolve(stored, device_count=1, process_count=1), pipeline)
    assert not experiment.frozen.encoders
    held = sum(x.size for x in jax.live_arrays() if id(x) not in before)
    assert held == sum(x.size for x in experiment.frozen.reference.values())


def test_each_epoch_samples_the_posterior_anew(config, tmp_path: Path) -> None:
    config = encoded(config("sd15", **{"data.random_flip": False, "data.encoded_views": 1, "data.limit": 4}))
    pipeline, derived = open_model(config, tmp_path), resolve(config, device_count=1, process_count=1)
    with open_training_batches(config, derived, make_inputs(config, pipeline)) as batches:
        first, second = next(batches), next(batches)
    assert agrees(first)
    rows = [{row.tobytes(): i for i, row in enumerate(batch.inputs.moments_BKhwC)} for batch in (first, second)]
    assert rows[0].keys() == rows[1].keys()
    encode = make_encode(pipeline, config.guidance)
    latents = [encode({}, batch, jax.vmap(jax.random.key)(jnp.asarray(batch.index_B)))[0] for batch in (first, second)]
    for moments, i in rows[0].items():
        assert not np.array_equal(latents[0][i], latents[1][rows[1][moments]])


def test_candidates_share_a_view_and_all_views_are_seen(config, tmp_path: Path) -> None:
    config = encoded(config("sd15", **{"data.encoded_views": 4, "data.random_crop": True, "data.batch_size": 16}))
    pipeline, derived = open_model(config, tmp_path), resolve(config, device_count=1, process_count=1)
    inputs = make_inputs(config, pipeline)
    encodings = inputs.stored
    sizes_I2 = open_prepared(config.data.path).sizes_I2
    oblong = [i for i in range(14) if sizes_I2[i, 0] != sizes_I2[i, 1]]  # of a square, crops are the whole
    moments_hwC, stored = np.empty(encodings.moments_shape(), ml_dtypes.bfloat16), {}
    for i, view in itertools.product(oblong, range(4)):
        encodings.read_moments(i, view, moments_hwC)
        stored[moments_hwC.tobytes()] = view
    assert len(stored) == 4 * len(oblong) > 20
    seen = []
    with open_training_batches(config, derived, inputs) as batches:
        for _ in range(8):
            seen += [[stored.get(x.tobytes()) for x in row] for row in next(batches).inputs.moments_BKhwC]
    pairs = [pair for pair in seen if None not in pair]
    assert all(a == b for a, b in pairs)
    assert {view for view, _ in pairs} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data.resolution": 64}, r"resolution was 32, now 64"),
        ({"data.random_crop": True}, r"views was 2 views flips, now 2 views crops and flips"),
        ({"data.encoded_views": 1, "data.random_flip": False}, r"views was 2 views flips, now 1 views of the centre"),
        ({"dtype": "bfloat16"}, r"dtype was 'float32', now 'bfloat16'"),
        ({"model": "random:sd21"}, r"models was 'sd15-\w+', now 'sd21-\w+'"),
    ],
    ids=["resolution", "crop", "views", "dtype", "model"],
)
def test_encodings_of_something_else_are_refused(config, tmp_path: Path, changed, message: str) -> None:
    encoded(config("sd15"))
    with pytest.raises(FileNotFoundError, match=f"no stored latents for this model and these settings.*{message}"):
        train(config("sd15", **changed), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("family", ["sd35", "flux", "zimage"])
def test_encodings_are_those_of_a_length_of_captions_and_of_any_guidance(config, tmp_path: Path, family: str) -> None:
    def facts(**fields: object):
        chosen = config(family, **fields)
        return encoding_facts(chosen, open_model(chosen, tmp_path))

    longer, own = facts(**{"data.text_length": 41}), facts(**{"data.text_length": 0})
    assert longer["text_length"] == 41
    assert own["text_length"] == {"sd35": 256, "flux": 512, "zimage": 512}[family]
    assert longer | {"text_length": own["text_length"]} == own
    if family == "flux":  # the others are not told a scale
        assert own == facts(guidance=1.0, **{"data.text_length": 0})


def test_encodings_of_older_versions_are_found(config, tmp_path: Path) -> None:
    """Stable Diffusion and SDXL read as many tokens as CLIP has, which is no fact."""
    chosen = config("sdxl")
    assert "text_length" not in encoding_facts(chosen, open_model(chosen, tmp_path))


def test_missing_and_damaged_files_are_told_before_training_and_mended(config, tmp_path: Path) -> None:
    config = config("sd15")
    with pytest.raises(FileNotFoundError, match=r"has no stored latents for this model.*; make them with python -m"):
        train(config, tmp_path / "run")
    encoded(config)
    (folder,) = (tmp_path / "data" / "encoded").glob("sd15-*")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, damage in {
        "images-00000.safetensors": whole["images-00000.safetensors"][:-1],
        "captions-00000.safetensors": None,
        "captions.arrow": b"no table",
        "encoding.json": b"{",
    }.items():
        (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
        with pytest.raises(
            ValueError, match=rf"the stored latents in {folder} are damaged \(.*\); repair them with python -m dpo"
        ):
            train(config, tmp_path / "run")
        encoded(config)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_more_files_than_a_process_may_open(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_jax.data.store.latents.FILE_BYTES", 2)  # a file for each row
    config = encoded(config("sd15"))
    pipeline, derived = open_model(config, tmp_path), resolve(config, device_count=1, process_count=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    inputs = make_inputs(config, pipeline)
    with open_training_batches(config, derived, inputs) as batches:
        next(batches)
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vae_dtype": "float16"}, "config.vae_dtype='float16' must be one of"),
        ({"data.resolution": 0}, "config.data.resolution=0 must be at least 1"),
        ({"data.encoded_views": 0}, "trains from images; set it to the number of views"),
        ({"model": ""}, "config.model is empty"),
    ],
)
def test_what_training_would_refuse_is_not_encoded(config, fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(config("sd15", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.encoded_views": 1},
            "one view of each image, but config.data.random_flip needs more; set",
        ),
        ({"data.encoded_views": 2, "data.random_flip": False}, "all views would be equal: set encoded_views=1"),
        ({"data.encoded_views": 3}, "without random_crop an image has two views"),
        ({"data.path": "random:8"}, "needs a prepared data set"),
        ({"data.encoded_views": -1}, "encoded_views=-1 must be at least 0"),
    ],
)
def test_views_that_cannot_be_stored_are_refused(config, fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(config("sd15", **fields), device_count=1, process_count=1)
