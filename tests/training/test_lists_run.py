"""Runs that learn from lists of ranked images."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.errors import UserError
from dpo_jax.planning.estimate import measure_work
from dpo_jax.training.defaults import with_fields
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.trainer import train

from ..killed_run import train_killed_and_resumed


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """Prepared: 12 prompts with two to five ranked images, the last two of which are tied where there are four."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        count = 2 + i % 4
        names = [f"{i}_{k}.png" for k in range(count)]
        for name in names:
            pixels_HWC = np.clip(rng.integers(256, size=3) + rng.normal(0, 30, (32, 40, 3)), 0, 255)
            Image.fromarray(pixels_HWC.astype(np.uint8)).save(tmp_path / name)
        ranks = [1, 2, 3, 3] if count == 4 else list(range(1, count + 1))
        rows.append(json.dumps({"prompt": f"prompt {i}", "images": names, "ranks": ranks}))
    (tmp_path / "lists.jsonl").write_text("\n".join(rows) + "\n")
    builder.prepare(SOURCES["jsonl"], [tmp_path / "lists.jsonl"], tmp_path / "data", workers=0, validation_fraction=0.2)
    return tmp_path / "data"


def fields(data: Path) -> dict[str, Any]:
    return {"loss.name": "plackett_luce", "data.path": str(data), "steps": 2, "log_every": 1, "checkpoint.every": 1}


def test_lists_of_any_length_reach_the_step_and_plans_know_their_size(
    tiny_config, steps_seen, ranked: Path, tmp_path: Path, capsys
) -> None:
    train(tiny_config("sd15", **fields(ranked), **{"data.candidates": 6, "data.batch_size": 8}), tmp_path / "run")

    said = capsys.readouterr()
    assert "training prompts; 2 steps x 8 prompts" in said.out
    assert "prompts/s" in said.err
    told = "config.data.candidates=6, but no prompt has more than 5 images."
    assert said.err.count(told) == 1
    assert len(steps_seen) == 2
    for experiment, batch in steps_seen:
        expected = experiment.abstract_batch()
        same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), expected, batch)
        assert all(jax.tree.leaves(same))
        preference_BK, valid_BK = np.asarray(batch.preference_BK), np.asarray(batch.valid_BK)
        assert {2, 5} <= set(valid_BK.sum(axis=1).tolist()) <= {2, 3, 4, 5}
        assert not preference_BK[~valid_BK].any()
        np.testing.assert_allclose(preference_BK.sum(axis=1), 1, rtol=1e-6)
        assert (np.diff(preference_BK, axis=1) <= 0).all()
        assert (preference_BK[:, 0] > preference_BK[:, 1]).all()
        assert not np.asarray(batch.inputs.images_BKHWC)[~valid_BK].any()


@pytest.mark.slow
def test_a_run_on_lists_trains_resumes_after_a_kill_plans_exports_and_has_a_card(
    tiny_config, ranked: Path, tmp_path: Path, capsys
) -> None:
    best = {"checkpoint.best": "pair_accuracy", "early_stop.metric": "winner_error", "validation.every": 1}
    config = tiny_config("sd15", **fields(ranked), **best)
    workdir = tmp_path / "run"
    loss, _ = train_killed_and_resumed(config, workdir)

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert math.log(2) < loss < math.log(24), "the policy is the reference, with lists of two to four images"
    assert trained[0]["pair/accuracy"] == pytest.approx(0.5, abs=0.2)
    assert any(name.startswith("pair/accuracy/noise_") for name in trained[0])
    held_out = [row for row in rows if "validation/prompts" in row][-1]
    assert 0 <= held_out["validation/pair_accuracy"] <= 1
    assert held_out["validation/error_loser_rise"] == pytest.approx(0, abs=0.1)
    said = capsys.readouterr().err
    assert "held-out prompts" in said
    assert "policy = reference makes" not in said
    with pytest.raises(UserError, match=r"data\.candidates was 4, now 3"):
        train(with_fields(config, {"data.candidates": 3}), workdir)

    pair = measure_work(with_fields(config, {"loss.name": "dpo"}), "gpu")
    two, four = (measure_work(with_fields(config, {"data.candidates": number}), "gpu") for number in (2, 4))
    assert two.model_flops == pytest.approx(pair.model_flops, rel=1e-3)
    assert four.model_flops / two.model_flops == pytest.approx(2, rel=0.05)
    assert four.activation_bytes / two.activation_bytes == pytest.approx(2, rel=0.2)

    folder = export(exportable_run(workdir), tmp_path / "unet", format="unet", dtype=None, max_shard_bytes=10**10)
    card = (folder / "README.md").read_text()
    assert "[Diffusion-LPO (Plackett-Luce)](https://arxiv.org/abs/2510.01540) for 2 steps" in card
    assert "| pair_accuracy |" in card
    assert '"data.candidates": 4' in card
