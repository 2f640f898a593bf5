"""What `import dpo_jax` offers does what the commands do."""

import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax import api
from dpo_jax.errors import UserError

ROOT = Path(__file__).parents[1]
MODEL = "dpo_jax/tiny/model"


def test_importing_is_cheap_and_offers_documented_functions():
    script = (
        "import sys, dpo_jax; print([m for m in sys.modules if m in ('jax', 'numpy', 'absl', 'flax')]); dpo_jax.train"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(dpo_jax.OFFERED) <= set(dir(dpo_jax))
    for name in dpo_jax.OFFERED:
        assert inspect.getdoc(getattr(dpo_jax, name)), name
        assert f"dpo_jax.{name}" in str(dpo_jax.__doc__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = dpo_jax.trian


def test_the_module_of_a_command_does_not_hide_the_function_of_its_name():
    importlib.import_module("dpo_jax.train")
    assert dpo_jax.train is api.train


def test_jax_that_was_started_before_is_warned_of(monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    with pytest.warns(RuntimeWarning, match="JAX was started before dpo_jax was imported"):
        dpo_jax._round_bfloat16_exactly()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dpo_jax._round_bfloat16_exactly()  # the flag is there now


def test_train_takes_names_of_configs_and_replaces_fields(monkeypatch, tmp_path):
    from dpo_jax.rounds import loop
    from dpo_jax.training import trainer

    runs = []
    monkeypatch.setattr(trainer, "train", lambda config, workdir: runs.append((config.steps, workdir)))
    monkeypatch.setattr(loop, "learn", lambda config, workdir, *_: runs.append((config.online.rounds, workdir)))
    dpo_jax.train("sdxl:tiny", tmp_path, {"steps": 3})
    dpo_jax.train("tiny_online:tiny", "x")
    assert runs == [(3, tmp_path), (2, "x")]
    with pytest.raises(UserError, match=r"no field 'optimizer.lr'; did you mean config.optimizer.learning_rate\?"):
        dpo_jax.train("tiny", tmp_path, {"optimizer.lr": 1})
    with pytest.raises(UserError, match=r"it is a group of loss\.beta"):
        dpo_jax.train("tiny", tmp_path, {"loss": 1})
    with pytest.raises(UserError, match=r"config.steps=0 must be at least 1"):
        dpo_jax.train("tiny", tmp_path, {"steps": 0})


def test_a_loaded_model_draws_images_that_depend_on_prompt_and_seed():
    model = dpo_jax.load_model(MODEL)
    images = model.sample(["a red circle", "a blue square"], seeds=2, steps=2, batch_size=8)
    assert [image.size for image in images] == [(32, 32)] * 4
    (again,) = model.sample("a blue square", seed=1, steps=2, batch_size=8)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(images[3]))
    assert not np.array_equal(np.asarray(images[2]), np.asarray(images[3]))
    assert model.sample([]) == []


def test_a_step_goes_with_a_run():
    with pytest.raises(UserError, match="step=3 goes with a training run, and dpo_jax/tiny/model is not"):
        dpo_jax.load_model(MODEL, step=3)


def test_export_writes_a_model(tmp_path):
    exported = dpo_jax.export(MODEL, tmp_path / "unet", format="unet", dtype="float16")
    assert (exported.path, exported.title) == (tmp_path / "unet", MODEL)
    assert (tmp_path / "unet" / "README.md").is_file()
    with pytest.raises(UserError, match="already exists"):
        dpo_jax.export(MODEL, tmp_path / "unet")


def test_a_judge_scores_images():
    judge = dpo_jax.open_judge("jpeg_compressibility")
    grey, noise = np.full((32, 32, 3), 128, np.uint8), np.random.default_rng(0).integers(256, size=(32, 32, 3))
    scores = judge.score([grey, noise.astype(np.uint8)], ["grey", "noise"])
    assert scores[0] > scores[1]
