"""Complete runs on flow models: what is trained and kept, what it is compared with, and that they continue exactly."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import Experiment, build, compose
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.model import make_placement, open_model
from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import train
from dpo_jax.weights.io import save_component

from .test_trainer import metrics_of

TABLE = "pos_embed.pos_embed"
"""Stable Diffusion 3's positions, which are stored and never trained."""
LOG_2 = float(np.float32(math.log(2)))
RATE = {"optimizer.learning_rate": 1e-3, "loss.beta": 5000.0}
LORA = {"lora.alpha": 0.0, "lora.rank": 4, "lora.targets": r"to_[qkv]$", **RATE}
FULL = {"lora.rank": 0, "lora.alpha": 0.0, **RATE}


def state_of(workdir: Path, step: int):
    state = ocp.PyTreeCheckpointer().restore((workdir / "checkpoints" / str(step)).absolute() / "state")
    return jax.tree.map(np.asarray, state)


def names_in(tree) -> set[str]:
    """All keys on the way to the leaves."""
    return {str(getattr(key, "key", key)) for path, _ in jax.tree.leaves_with_path(tree) for key in path}


def losses_of(workdir: Path) -> list[float]:
    return [row["train/loss"] for row in metrics_of(workdir) if "train/loss" in row]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sd35", {**RATE, "ema.decay": 0.9}),
        pytest.param("sd35", LORA, marks=pytest.mark.slow),
        pytest.param("flux", FULL, marks=pytest.mark.slow),
        pytest.param("flux", LORA, marks=pytest.mark.slow),
        pytest.param("zimage", FULL, marks=pytest.mark.slow),
        pytest.param("zimage", LORA, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "lora" if value.get("lora.rank") else "full",
)
def test_trains_validates_samples_and_continues_exactly(tiny_config, tmp_path, name, fields) -> None:
    config = tiny_config(name, **{"validation.every": 4, "sample.every": 4, **fields})
    train(config, tmp_path)
    rows, losses, whole = metrics_of(tmp_path), losses_of(tmp_path), state_of(tmp_path, 4)
    assert len(losses) == 4
    assert losses[0] == LOG_2, "policy and reference compute the same numbers"
    assert abs(losses[-1] - LOG_2) > 1e-3
    assert 0 <= rows[-1]["validation/pair_accuracy"] <= 1
    assert (tmp_path / "samples" / "step_000004.png").read_bytes()[:4] == b"\x89PNG"
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    config.validation.every = config.sample.every = 0
    train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole, state_of(tmp_path, 4))
    if name == "sd35":
        assert not {part for part in names_in(whole) if TABLE in part}
        assert open_run(tmp_path).policy[TABLE].size == 6**2 * 32, "it is drawn with"


@pytest.mark.parametrize("fields", [{"ema.decay": 0.9, "moving_reference.every": 1}, {"ema.decay": 0.9}, LORA])
def test_the_table_of_positions_is_no_state_but_a_part_of_policy_and_reference(tiny_config, tmp_path, fields) -> None:
    config = tiny_config("sd35", **{"lora.rank": 0, **fields})
    pipeline = open_model(config, tmp_path)
    derived = resolve(config, device_count=1, process_count=1)
    experiment = compose(config, derived, pipeline, make_placement(config))
    state = experiment.abstract_state()
    assert len(names_in(state)) > 20
    assert TABLE not in names_in(state)
    assert TABLE in experiment.frozen.policy(state.params)
    assert TABLE in experiment.frozen.with_reference(state.reference).whole_reference()
    assert TABLE not in experiment.frozen.reference


@pytest.mark.parametrize("name", ["sd35", "flux", "zimage"])
def test_another_transformer_and_another_reference_are_read_from_their_own_places(tiny_config, tmp_path, name) -> None:
    """The first is in a folder of its own; the second in a model's, in several files and in float16."""
    family = tiny_config(name).model.removeprefix("random:")
    write_random_model(family, tmp_path / "other", seed=9)
    other = load_pipeline(tmp_path / "other", dtype="float32")
    expected = other.load("transformer", dtype=jnp.float32)
    save_component(
        tmp_path / "parts" / "transformer",
        json.loads((tmp_path / "other" / "transformer" / "config.json").read_text()),
        expected,
        other.denoiser.specs,
        dtype=np.float16,
        max_shard_bytes=10_000,
    )
    config = tiny_config(name, transformer=str(tmp_path / "other" / "transformer"), **FULL)
    experiment = built(config, tmp_path)
    policy = experiment.frozen.policy(experiment.initial_state().params)
    jax.tree.map(np.testing.assert_array_equal, policy, dict(expected))
    jax.tree.map(np.testing.assert_array_equal, experiment.frozen.whole_reference(), dict(expected))

    experiment = built(tiny_config(name, reference=str(tmp_path / "parts"), **LORA), tmp_path)
    for parameter, value in experiment.frozen.whole_reference().items():
        np.testing.assert_array_equal(value, np.float32(np.float16(expected[parameter])))
    assert any(not np.array_equal(value, expected[parameter]) for parameter, value in experiment.frozen.base.items())
    with pytest.raises(UserError, match=r"unet=nowhere was given, but the denoiser of .* is a transformer"):
        built(tiny_config(name, unet="nowhere"), tmp_path)


def built(config, tmp_path: Path) -> Experiment:
    return build(config, resolve(config, device_count=1, process_count=1), open_model(config, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35", "flux", "zimage"])
def test_a_lora_whose_reference_moves_is_exported_and_gone_on_from(tiny_config, tmp_path, name) -> None:
    fields = {**LORA, "moving_reference.every": 2, "optimizer.warmup_steps": 0}
    train(tiny_config(name, **fields), tmp_path / "first")
    at_log_2 = [loss == LOG_2 for loss in losses_of(tmp_path / "first")]
    assert at_log_2 == [True, False, True, False], "the reference is renewed"
    file = export(
        exportable_run(tmp_path / "first"), tmp_path / "lora", format="lora", dtype=None, max_shard_bytes=10**10
    )
    begins = {"lora.init": str(file), "lora.rank": 0, "lora.targets": LORA["lora.targets"], "steps": 1}
    trained = open_run(tmp_path / "first").params
    for both in (False, True):
        workdir = tmp_path / str(both)
        train(tiny_config(name, **{**RATE, **begins, "lora.init_reference": both}), workdir)
        assert (losses_of(workdir)[0] == LOG_2) == both
    experiment = built(tiny_config(name, **{**RATE, **begins}), tmp_path)
    for parameter, value in experiment.initial_state().params.items():
        np.testing.assert_allclose(value, trained[parameter], rtol=1e-6, err_msg=parameter)
