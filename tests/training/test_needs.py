"""Anything that the first grid, checkpoint or validation lacks is reported before models are loaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpo_jax.cli import load_config, replaced
from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.select import NothingChosenError, select
from dpo_jax.rounds.loop import learn
from dpo_jax.training import needs as needs_module
from dpo_jax.training import trainer
from dpo_jax.training.data import check_data
from dpo_jax.training.needs import check_room
from dpo_jax.training.trainer import train


def not_loaded(*_, **__):
    pytest.fail("weights were loaded")


@pytest.fixture
def prepare(tmp_path: Path):
    """`prepare(pairs=6, prompts=1)` makes a data set of that many pairs and returns its folder."""

    def make(pairs: int, prompts: int) -> str:
        rng = np.random.default_rng(0)
        rows = []
        for i in range(pairs):
            for side in "ab":
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}{side}.png")
            images = [f"{i}a.png", f"{i}b.png"]
            rows.append({"prompt": f"prompt {i % prompts}", "images": images, "preferred": 0})
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        builder.prepare(SOURCES["jsonl"], [tmp_path / "pairs.jsonl"], tmp_path / "data", workers=0)
        return str(tmp_path / "data")

    return make


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.resolution": 36}, r"resolution=36 must be a multiple of 8 pixels"),
        ({"sample.steps": 5000}, r"num_steps=5000 must be between 1 and 1000"),
        ({"sample.sampler": "lcm", "sample.steps": 999}, r"num_steps=999"),
    ],
)
def test_grids_that_cannot_be_drawn_are_told_at_the_start(tiny_config, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(trainer, "build", not_loaded)
    config = tiny_config("sd15", **{"sample.every": 2, "model": "dpo_jax/tiny/model"} | fields)
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run")
    assert str(error.value).startswith("the image grids of config.sample.every=2 can't be drawn: ")
    assert str(error.value).endswith("or set config.sample.every=0")
    assert not (tmp_path / "run").exists()


def test_so_are_those_of_an_online_run(online_config, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_jax.rounds.loop.build", not_loaded)
    config = replaced(online_config, {"sample.every": 2, "data.resolution": 36, "model": "dpo_jax/tiny/model"})
    with pytest.raises(ValueError, match=r"grids of config\.sample\.every=2 can't be drawn: resolution=36"):
        learn(config, tmp_path / "run")


@pytest.fixture
def online_config():
    return load_config(f"{Path(__file__).parents[2]}/configs/tiny_online.py:tiny")


def test_one_prompt_trains_without_validation_and_says_so(tiny_config, prepare, capsys):
    config = tiny_config("sd15", **{"data.path": prepare(6, 1), "validation.every": 2})
    settled = check_data(config)
    assert (settled.validation.every, config.validation.every) == (0, 2)
    assert settled.data.path == config.data.path
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2
    assert said.splitlines()[1].startswith("validation is off: the data set ")
    assert "has no split 'validation'; it has train. To validate, prepare more prompts" in said


def test_so_does_a_choice_that_leaves_nothing_held_out(prepare):
    prepared = open_prepared(prepare(6, 1))
    for split, min_side in (("validation", 0), ("train", 4000)):
        with pytest.raises(NothingChosenError, match=r"no split 'validation'|no record is left"):
            select(prepared, split=split, min_side=min_side)


def test_epochs_are_told_of_the_pairs_that_are_trained_on(tiny_config, prepare, capsys):
    config = tiny_config("sd15", **{"data.path": prepare(3, 3), "data.batch_size": 64})
    check_data(config)
    said = capsys.readouterr()
    assert said.out.startswith("data: 2 training pairs; 4 steps x 64 pairs = 128 epochs\n")
    assert said.err.startswith("warning: 4 steps x 64 pairs = 128 epochs over 2 pairs: the model will memorise them")


STATE = {"params": jax.ShapeDtypeStruct((1000, 256), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
BYTES = 1000 * 256 * 4 + 4


@pytest.mark.parametrize(
    ("free", "saved", "outcome"),
    [
        (0.5, (), "error"),
        (1.5, (), "warning"),
        (3.5, (), "warning"),
        (4.0, (), ""),
        (0.95, (1, 2), "warning"),
        (2.0, (1, 2), ""),
        (1.0, (1, 2, 3), ""),
        (0.5, (1, 2, 3), "error"),
        (0.0, (1, 2, 4), ""),  # all steps are done
    ],
)
def test_room_for_checkpoints(tiny_config, tmp_path, monkeypatch, capsys, free, saved, outcome):
    config = tiny_config("sd15", steps=4, **{"checkpoint.every": 1})
    assert config.checkpoint.keep == 3
    for step in saved:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * BYTES)))
    if outcome == "error":
        with pytest.raises(OSError, match=r"^a checkpoint takes 1000 KiB, and 500 KiB are free in .*; make room"):
            check_room(config, tmp_path, STATE)
        return
    check_room(config, tmp_path, STATE)
    said = capsys.readouterr().err
    assert ("but the run needs room for" in said) == (outcome == "warning"), said


@pytest.mark.parametrize(("keep", "keep_every", "needs"), [(3, 0, 4), (0, 0, 8), (2, 4, 5), (7, 0, 8)])
def test_room_is_looked_for_as_much_as_is_kept(tiny_config, tmp_path, monkeypatch, capsys, keep, keep_every, needs):
    fields = {"checkpoint.every": 1, "checkpoint.keep": keep, "checkpoint.keep_every": keep_every}
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=BYTES))
    check_room(tiny_config("sd15", steps=8, **fields), tmp_path, STATE)
    assert f"needs room for {needs} more checkpoints of 1000 KiB; make room, or keep" in capsys.readouterr().err


def test_a_full_disk_is_told_before_weights_are_loaded(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build", not_loaded)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    with pytest.raises(OSError, match=r"a checkpoint takes .* MiB, and 97\.66 KiB are free in"):
        train(tiny_config("sd15", model="dpo_jax/tiny/model"), tmp_path / "run")
