"""A run on masked data: its batches, the plan's batch, and settings that contradict each other."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.errors import UserError
from dpo_jax.planning.synthetic import random_batch
from dpo_jax.training.config import check
from dpo_jax.training.trainer import train


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        names = [f"{number}_{kind}.png" for kind in ("better", "worse", "mask")]
        pixels_HW = 6 * np.mgrid[:32, :40][1]
        for name, shown_HW in zip(names, (pixels_HW, rng.integers(0, 256, (32, 40)), pixels_HW), strict=True):
            Image.fromarray(shown_HW.astype(np.uint8)).save(tmp_path / name)
        better, worse, mask = names
        rows.append(
            {"prompt": f"{number}", "chosen": better, "rejected": worse, "chosen_mask": mask, "rejected_mask": mask}
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder.prepare(SOURCES["jsonl"], [tmp_path / "pairs.jsonl"], tmp_path / "data", workers=0, validation_fraction=0.2)
    return tmp_path / "data"


def test_the_step_sees_masks_and_plans_know_their_size(
    tiny_config, steps_seen, masked: Path, tmp_path: Path, capsys
) -> None:
    fields = {"data.path": str(masked), "data.masks": True, "data.mask_floor": 0.5, "steps": 1}
    train(tiny_config("sd15", **fields), tmp_path / "run")

    assert " records have one\n" in capsys.readouterr().out
    ((experiment, batch),) = steps_seen
    for expected in (experiment.abstract_batch(), random_batch(experiment, seed=0)):
        same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), expected, batch)
        assert jax.tree.all(same)
    weight_BKhw = np.asarray(batch.cell_weight_BKhw)
    np.testing.assert_allclose(weight_BKhw.mean(axis=(2, 3)), 1, rtol=1e-6)
    np.testing.assert_array_equal(weight_BKhw[:, 0], weight_BKhw[:, 1])
    assert weight_BKhw.min() < 0.9


def test_a_floor_needs_masks(tiny_config) -> None:
    with pytest.raises(UserError, match=r"config.data.mask_floor=0.5 has no effect without masks; set data.masks=True"):
        check(tiny_config("sd15", **{"data.mask_floor": 0.5}))
