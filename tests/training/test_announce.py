"""What a run says at its start: the fields that differ from the defaults, and how often it sees its data."""

from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import flatten, load_config
from dpo_jax.training import sample_grids
from dpo_jax.training.announce import announce_config, announce_epochs, config_table
from dpo_jax.training.config import default_config
from dpo_jax.training.loop import Loop
from dpo_jax.training.model import load_denoiser
from dpo_jax.training.trainer import train

ROOT = Path(__file__).parents[2]


def test_the_config_is_a_short_table_of_what_differs_from_the_defaults(capsys) -> None:
    config, defaults = load_config(f"{ROOT}/configs/sdxl.py"), default_config()
    announce_config(config, defaults, "runs/x")
    said = capsys.readouterr().out.splitlines()
    assert "config (all fields: runs/x/config.json):" in said[0]
    assert len(said) < 25
    assert all(len(line) < 120 for line in said)
    table = {line.split()[0]: line.split()[1:] for line in said[1:]}
    assert table["data.resolution"] == ["1024", "default", "512"]
    assert table.keys() == {f for f, value in flatten(config).items() if value != flatten(defaults)[f]}
    assert config_table(flatten(defaults), flatten(defaults)) == "  all fields have their defaults"
    assert "..." in config_table({"sample.prompts": ("a" * 100,)}, {"sample.prompts": ()})


@pytest.mark.parametrize(
    ("steps", "batch", "pairs", "loss", "said", "warned"),
    [
        (2000, 2048, 851_293, "dpo", "851,293 training pairs; 2,000 steps x 2,048 pairs = 4.8 epochs", ""),
        (2000, 2048, 200, "dpo", "= 20,480 epochs", "set config.data.batch_size far below 200 and then fewer"),
        (500, 16, 200, "sft", "x 16 images = 40 epochs", "set config.steps=250 or less (20 epochs)"),
        (250, 16, 200, "kto", "200 training votes; 250 steps x 16 votes = 20 epochs", ""),
        (250, 16, 200, "dpo", "= 20 epochs", ""),
    ],
)
def test_epochs_are_told_and_warned_of(capsys, steps, batch, pairs, loss, said, warned) -> None:
    config = default_config()
    config.steps, config.data.batch_size, config.loss.name = steps, batch, loss
    announce_epochs(config, pairs)
    told = capsys.readouterr()
    assert said in told.out
    assert told.out.count("\n") == 1
    assert (warned in told.err) if warned else not told.err


@pytest.mark.parametrize(
    ("fields", "beside"),
    [
        ({"loss.name": "dpo"}, "reference"),
        ({"loss.name": "sft"}, "base"),
        ({"loss.name": "sft", "lora.rank": 2}, "base"),
    ],
)
def test_the_first_grid_is_of_step_0_and_shows_the_base_beside_the_policy(
    tiny_config, tmp_path, monkeypatch, fields, beside
) -> None:
    drawn, titles = [], []

    def make_generator(config, pipeline, encoders, placement, batch_size, report):
        def generate(params, captions, seeds):
            drawn.append(params)
            return np.zeros((len(captions), 8, 8, 3), np.uint8)

        base.update(load_denoiser(pipeline, placement))
        return generate

    def grid(rows, columns):
        titles.append(columns)
        return image_grid(rows, columns)

    base, image_grid = {}, sample_grids.image_grid
    monkeypatch.setattr(sample_grids, "make_generator", make_generator)
    monkeypatch.setattr(sample_grids, "image_grid", grid)
    monkeypatch.setattr(Loop, "run", lambda loop, state, batches: state)
    train(tiny_config("sd15", **{"sample.every": 2} | fields), tmp_path)
    assert titles == [[beside, "policy"]]
    assert (tmp_path / "samples" / "step_000000.png").exists()
    compared_with, policy = drawn
    for params in drawn:  # before the first update all are the base, and a LoRA adds nothing to it yet
        for name, value in base.items():
            np.testing.assert_array_equal(params[name], value)
    assert compared_with.keys() == base.keys()
    assert (policy.keys() > base.keys()) == ("lora.rank" in fields)
