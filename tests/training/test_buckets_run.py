"""Runs on images of several shapes: from images and from stored latents, stopped, resumed, validated and exported."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from dpo_jax.data.images import Shape, View, cover, decode
from dpo_jax.data.load.records import open_records
from dpo_jax.data.prepare import builder
from dpo_jax.data.prepare.verify import verify
from dpo_jax.data.sources import SOURCES
from dpo_jax.errors import UserError
from dpo_jax.training.buckets import all_shapes, largest_shape
from dpo_jax.training.config import check, resolve
from dpo_jax.training.data import make_inputs, open_training_batches, open_validation_batches
from dpo_jax.training.encoding import encode_data
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.model import open_model
from dpo_jax.training.trainer import train


@pytest.fixture(scope="module")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared: 12 pairs, most of them wide, some square, with masks."""
    folder = tmp_path_factory.mktemp("shapes")
    rng, rows = np.random.default_rng(0), []
    for number in range(12):
        size = [(36, 64), (40, 66), (48, 48)][number % 3]
        names = [f"{number}_{kind}.png" for kind in ("better", "worse", "mask")]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
        rows.append({"prompt": f"{number}", "chosen": names[0], "rejected": names[1], "chosen_mask": names[2]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder.prepare(SOURCES["jsonl"], [folder / "pairs.jsonl"], folder / "data", workers=0, validation_fraction=0.3)
    return folder / "data"


FIELDS = {"data.buckets": "data", "data.size_conditioning": "real", "data.random_crop": True}


def test_a_run_sees_every_bucket_and_saves_where_it_is(
    tiny_config, steps_seen, shapes_data: Path, tmp_path: Path, capsys
) -> None:
    """With masks; an epoch is three batches."""
    fields = FIELDS | {"data.path": str(shapes_data), "data.masks": True, "data.mask_floor": 0.5}
    train(tiny_config("sd15", **fields, steps=4), tmp_path / "run")
    out = capsys.readouterr()
    assert re.search(
        r"buckets: 40x24: 5 pairs, 4\.\d% cropped\n         32x32: 3 pairs, 0\.0% cropped\n"
        r"         an epoch has 3 batches of 4; 33\.3% of that is padding\n"
        r"         in all, 2\.\d% of an image is cropped, 26\.\d% with squares\n",
        out.out,
    )
    assert out.err.count("compiling the training step for bucket 2 of 2") == 1
    seen = [batch for _, batch in steps_seen]
    sides = [batch.inputs.images_BKHWC.shape[2:4] for batch in seen]
    assert sorted(sides[:3]) == [(24, 40), (24, 40), (32, 32)]
    assert sum(float(np.sum(batch.weight_B)) for batch in seen[:3]) == 8
    for batch in seen:
        height, width = batch.inputs.images_BKHWC.shape[2:4]
        np.testing.assert_array_equal(batch.size_cond_BK6[..., 4:], np.broadcast_to([height, width], (4, 2, 2)))
        assert batch.cell_weight_BKhw.shape[2:] == (height // 4, width // 4)
        np.testing.assert_allclose(np.asarray(batch.cell_weight_BKhw).mean(axis=(2, 3)), 1, rtol=1e-6)

    experiment, batch = steps_seen[0]
    config, derived = experiment.config, experiment.derived
    _, position = state_of(tmp_path / "run", 2)
    with open_training_batches(config, derived, make_inputs(config, experiment.pipeline)) as batches:
        batches.set_state(position)
        for one in seen[2:]:
            jax.tree.map(np.testing.assert_array_equal, one, next(batches))
    planned = experiment.abstract_batch()  # plans count with the square, which has the most pixels
    assert planned.inputs.images_BKHWC.shape == (4, 2, 32, 32, 3)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x.ndim, x.dtype) == (y.ndim, y.dtype), planned, batch))


def state_of(workdir: Path, step: int) -> tuple[Any, dict[str, int]]:
    """The training state of a checkpoint, and its position in the data."""
    folder = (workdir / "checkpoints" / str(step)).absolute()
    state = jax.tree.map(np.asarray, ocp.PyTreeCheckpointer().restore(folder / "state"))
    return state, json.loads((folder / "position" / "metadata").read_text())


def test_stored_latents_of_buckets(tiny_config, shapes_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Each row is the view of its image, cropped to the bucket; the networks are stand-ins that keep what they see."""

    def means(vae, params, images_NHWC):
        n, height, width, _ = images_NHWC.shape
        cells = images_NHWC.astype(jnp.float32).reshape(n, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
        return jnp.tile(cells, 3)[..., :8]

    monkeypatch.setattr("dpo_jax.encode.dataset.posterior_moments", means)
    data = shutil.copytree(shapes_data, tmp_path / "data")
    fields = FIELDS | {"data.path": str(data), "data.encoded_views": 2, "data.random_flip": True}
    config = tiny_config("sd15", **fields)
    said: list[str] = []
    folder = encode_data(config, 2, said.append, lambda *done: None)
    assert {"images-40x24-00000.safetensors", "images-32x32-00000.safetensors"} < {
        file.name for file in folder.iterdir()
    }
    assert "images-40x24 16 x " in said[0]
    assert verify(data).files
    pipeline, derived = open_model(config, tmp_path), resolve(config, device_count=1, process_count=1)
    found = {}
    for views in (2, 0):
        one = tiny_config("sd15", **fields | {"data.encoded_views": views})
        inputs = make_inputs(one, pipeline)
        assert list(inputs.shapes) == [(24, 40), (32, 32)]
        with open_training_batches(one, derived, inputs) as batches:
            found[views] = [next(batches) for _ in range(6)]
        with open_validation_batches(one, derived, inputs) as batches:
            found[views] += list(batches)
    assert len({batch.inputs.moments_BKhwC.shape for batch in found[2]}) == 2
    for stored, fresh in zip(found[2], found[0], strict=True):
        np.testing.assert_array_equal(stored.index_B, fresh.index_B)
        np.testing.assert_array_equal(stored.weight_B, fresh.weight_B)
        np.testing.assert_array_equal(stored.size_cond_BK6[..., [0, 1, 4, 5]], fresh.size_cond_BK6[..., [0, 1, 4, 5]])
        assert stored.inputs.moments_BKhwC.shape[2:4] == tuple(s // 8 for s in fresh.inputs.images_BKHWC.shape[2:4])
    records = open_records(data, "validation")
    pixels = [decode(image) for i in range(len(records)) for image in records.read_images(records[i])]
    rows = [row for batch in found[2][6:] for b, row in enumerate(batch.inputs.moments_BKhwC) if batch.weight_B[b]]
    order = np.argsort([index for batch in found[2][6:] for index in batch.index_B[batch.weight_B > 0]])
    for image, cells in zip(pixels, itertools.chain.from_iterable(rows[i] for i in order), strict=True):
        crop_HWC, _ = cover(image, tuple(8 * side for side in cells.shape[:2]), View())
        expected = np.asarray(means(None, None, crop_HWC[None]))[0]
        np.testing.assert_allclose(cells.astype(np.float32), expected, rtol=2**-8)

    with pytest.raises(FileNotFoundError, match=r"buckets was '40x24 32x32', now '40x24'"):
        make_inputs(tiny_config("sd15", **fields, **{"data.batch_size": 8}), pipeline)
    with pytest.raises(FileNotFoundError, match=r"no stored latents"):
        make_inputs(tiny_config("sd15", **fields | {"data.buckets": ""}), pipeline)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.order": "curriculum", "data.judges": ("a",)},
            r"breaks the order of config.data.order=curriculum; set ",
        ),
        ({"loss.name": "kto"}, r"kto takes liked and disliked images in turn; leave data.buckets empty"),
        ({"data.buckets": "sdx"}, r"config.data.buckets='sdx' must be one of '', 'sdxl', 'flux', 'data'"),
    ],
)
def test_what_buckets_do_not_go_with(tiny_config, fields, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tiny_config("sd15", **{"data.buckets": "sdxl"} | fields))


@pytest.mark.parametrize(
    ("name", "most_cells", "largest"),
    [
        ("", None, (1024, 1024)),
        ("sdxl", None, (1024, 1024)),
        ("flux", 192, (800, 1328)),
        ("flux", 160, (1024, 1024)),
        ("data", None, (1024, 1024)),
    ],
)
def test_plans_count_with_the_shape_of_most_pixels(tiny_config, name: str, most_cells, largest: Shape) -> None:
    config = tiny_config("sd15", **{"data.buckets": name, "data.resolution": 1024})
    denoiser = SimpleNamespace(config=SimpleNamespace(size_multiple=2, most_cells=most_cells))
    pipeline: Any = SimpleNamespace(vae_factor=8, denoiser=denoiser)
    assert sorted(largest_shape(config, pipeline)) == sorted(largest)
    if name and most_cells:
        assert max(map(max, all_shapes(config, pipeline))) <= 8 * most_cells
        denoiser.config.most_cells = 64
        with pytest.raises(UserError, match=r"resolution=1024 is too large: this model has positions for 512 pixels"):
            all_shapes(config, pipeline)


@pytest.mark.slow
def test_a_model_trains_on_all_shapes_and_is_exported(tiny_config, shapes_data: Path, tmp_path: Path) -> None:
    """In micro-batches; it is validated, stopped, resumed to the bit, sampled and exported."""
    fields = FIELDS | {"data.path": str(shapes_data), "data.micro_batch": 2, "optimizer.learning_rate": 1e-4}
    fields |= {"validation.every": 4, "sample.every": 4, "checkpoint.every": 2}
    train(tiny_config("sd15", **fields, steps=4), tmp_path / "whole")
    train(tiny_config("sd15", **fields, steps=2), tmp_path / "stopped")
    train(tiny_config("sd15", **fields, steps=4), tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, *(state_of(tmp_path / name, 4) for name in ("whole", "stopped")))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)
    assert [line["validation/pairs"] for line in lines if "validation/pairs" in line] == [4, 4]
    assert (tmp_path / "whole" / "samples" / "step_000004.png").exists()
    done = export(
        exportable_run(tmp_path / "whole"), tmp_path / "out", format="unet", dtype=None, max_shard_bytes=2**30
    )
    assert done


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35", "flux", "zimage"])
def test_transformers_take_flux_shapes(tiny_config, shapes_data: Path, tmp_path: Path, family: str) -> None:
    """The tiny SD3 has positions for 48 pixels a side."""
    fields = {"data.path": str(shapes_data), "data.buckets": "flux", "data.resolution": 32, "steps": 3}
    train(tiny_config(family, **fields), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["train/loss"] for line in lines if "train/loss" in line]).all()
