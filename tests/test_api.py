"""What `import dpo_jax` offers does what the commands do."""

import concurrent.futures
import importlib
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import dpo_jax
from dpo_jax import backend
from dpo_jax.api import training
from dpo_jax.errors import ExistingFileError, UserError
from dpo_jax.training.preemption import Notice

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
    known = set(flags.FLAGS)
    importlib.import_module("dpo_jax.train")
    assert dpo_jax.train is training.train
    for flag in set(flags.FLAGS) - known:  # a command requires some of its own, and so would all later tests
        delattr(flags.FLAGS, flag)


def test_jax_that_was_started_before_is_warned_of(monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    with pytest.warns(RuntimeWarning, match="JAX was started before dpo_jax was imported"):
        backend.set_variables()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.set_variables()  # the flag is there now


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
    with pytest.raises(UserError, match=r"it is a group of .*loss\.beta"):
        dpo_jax.train("tiny", tmp_path, {"loss": 1})
    with pytest.raises(UserError, match=r"config.steps=0 must be at least 1"):
        dpo_jax.train("tiny", tmp_path, {"steps": 0})
    with pytest.raises(
        UserError, match=r"config.data.accumulation=2 is replaced by .* Set data.micro_batch=\d+ on one"
    ):
        dpo_jax.train("tiny", tmp_path, {"data.accumulation": 2})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json is not a config file, which is Python and ends in .py"):
        dpo_jax.train(str(tmp_path / "config.json"), tmp_path)


def test_a_thread_can_await_a_notice():
    """Python handles signals in the main thread alone."""

    def notified() -> bool:
        with Notice.awaited() as notice:
            return notice.given(1)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert not threads.submit(notified).result()


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


def test_prepare_then_again(tmp_path):
    arguments = {"workers": 0, "validation_fraction": 0.1}
    prepared = dpo_jax.prepare("dpo_jax/tiny/pairs.parquet", tmp_path / "data", **arguments)
    assert prepared.summary is not None
    assert (prepared.folder, prepared.records > 100) == (tmp_path / "data", True)
    again = dpo_jax.prepare(["dpo_jax/tiny/pairs.parquet"], str(tmp_path / "data"), **arguments)
    assert (again.summary, again.records) == (None, prepared.records)
    with pytest.raises(UserError, match="source=pickapik is not a layout"):
        dpo_jax.prepare("dpo_jax/tiny/pairs.parquet", tmp_path / "other", source="pickapik")
    with pytest.raises(UserError, match="--input is missing"):
        dpo_jax.prepare([], tmp_path / "other")


def test_prepare_into_the_folder_that_it_reads(tmp_path):
    for folder in ("w", "l"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), "red" if folder == "w" else "blue").save(tmp_path / folder / "0.png")
        (tmp_path / folder / "0.txt").write_text("a square")
    prepared = dpo_jax.prepare(tmp_path, tmp_path / "data", workers=0)
    assert dpo_jax.prepare(tmp_path, tmp_path / "data").records == prepared.records == 1
    Image.new("RGB", (8, 8), "green").save(tmp_path / "w" / "0.png")
    with pytest.raises(ExistingFileError, match=r"was prepared before .*/w/0.png last changed"):
        dpo_jax.prepare(tmp_path, tmp_path / "data")


def test_evaluate_compares_folders_of_images(tmp_path):
    for name, top in (("smooth", 1), ("noisy", 256)):
        (tmp_path / name).mkdir()
        for n in range(4):
            pixels = np.random.default_rng(n).integers(top, size=(32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{n}.png")
            (tmp_path / name / f"{n}.txt").write_text(f"prompt {n}")
    folders = {name: str(tmp_path / name) for name in ("noisy", "smooth")}
    output = tmp_path / "evaluation"
    result = dpo_jax.evaluate(images=folders, judges="jpeg_compressibility", output=output)
    assert (result["win_rate"], result["comparisons"]) == (1.0, 4)
    assert json.loads((output / "result.json").read_text())["win_rate"] == 1.0
    assert (output / "report.html").is_file()
    with pytest.raises(UserError, match="names only one"):
        dpo_jax.evaluate({"base": MODEL}, judges="shapes", output=output, prompts="bundled")
    with pytest.raises(UserError, match="--judges is missing"):
        dpo_jax.evaluate(images=folders, judges=[], output=output)
