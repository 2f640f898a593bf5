"""Runs whose frozen denoiser is quantised: what is held, that policy and reference begin alike, and resuming."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from qwix import QArray

from dpo_jax.batch import Conditioning
from dpo_jax.cli import flatten
from dpo_jax.errors import UserError
from dpo_jax.models.random_model import write_random_model
from dpo_jax.planning.sizes import held_bytes
from dpo_jax.training.config import check_same_experiment, default_config, resolve
from dpo_jax.training.experiment import Experiment, build
from dpo_jax.training.model import load_denoiser, open_model
from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import train
from dpo_jax.weights.quantised import QTYPES, quantise

LORA = {"lora.rank": 4, "optimizer.learning_rate": 1e-2, "optimizer.scale_by_batch": False}
LORA |= {"optimizer.schedule": "constant", "loss.beta": 100.0, "checkpoint.every": 1}

CONVOLUTION = "mid_block.resnets.0.conv1.kernel"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel"


@pytest.fixture(scope="module", autouse=True)
def _small_weights_too() -> Iterator[None]:
    """Quantise the weights of tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_jax.weights.quantised.SMALL", 1024)
        yield


def losses_of(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def experiment_of(config: Any, workdir: Path) -> Experiment:
    return build(config, resolve(config, device_count=1, process_count=1), open_model(config, workdir))


@pytest.fixture(scope="module")
def experiments(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Experiment]:
    """Return the experiment in bfloat16 by the kind of its frozen weights."""

    @functools.cache
    def experiment(kind: str) -> Experiment:
        config = tiny_config("sd15", dtype="bfloat16", **LORA, **{"memory.frozen": kind})
        return experiment_of(config, tmp_path_factory.mktemp(kind))

    return experiment


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "float8"))])
def test_the_base_is_what_the_model_holds_quantised(experiments: Callable[[str], Experiment], kind: str) -> None:
    experiment = experiments(kind)
    base, stored = experiment.frozen.base, load_denoiser(experiment.pipeline, experiment.placement)
    quantised = {name for name, value in base.items() if isinstance(value, QArray)}
    assert len(quantised) > 25
    assert not any("conv_in" in name or "conv_out" in name or "time_embedding" in name for name in quantised)
    for name, value in stored.items():
        if name not in quantised:
            np.testing.assert_array_equal(base[name], value)
    for name in (ATTENTION, CONVOLUTION):
        jax.tree.map(np.testing.assert_array_equal, base[name], quantise(stored[name], QTYPES[kind]))
    sizes = [sum(map(held_bytes, (each[name] for name in quantised))) for each in (stored, base)]
    assert sizes[0] > (2.5 if kind == "nf4" else 1.8) * sizes[1]
    assert experiment.frozen.whole_reference().keys() == base.keys(), "the reference needs no copy"


def test_policy_and_reference_begin_alike_in_bfloat16(experiments: Callable[[str], Experiment]) -> None:
    """A new adapter changes nothing."""
    experiment = experiments("nf4")
    policy = experiment.frozen.policy(experiment.initial_state().params)
    random = np.random.default_rng(0)
    x_NHWC, context_NLD = (jnp.asarray(random.normal(size=size), "bfloat16") for size in ((2, 8, 8, 4), (2, 5, 32)))
    both = jax.jit(
        lambda *each: [
            experiment.pipeline.denoise(params, x_NHWC, jnp.array([10, 900]), Conditioning(context_NLD))
            for params in each
        ]
    )
    of_policy, of_reference = both(policy, experiment.frozen.whole_reference())
    np.testing.assert_array_equal(of_policy, of_reference)
    changed = {name: value + 0.1 for name, value in experiment.initial_state().params.items()}
    assert not np.array_equal(
        both(experiment.frozen.policy(changed), experiment.frozen.whole_reference())[0], of_policy
    )


@pytest.mark.slow
def test_a_run_begins_at_log_2_learns_and_resumes_exactly(tiny_config: Any, tmp_path: Path) -> None:
    for workdir, stops in ((tmp_path / "whole", [3]), (tmp_path / "parts", [1, 3])):
        for steps in stops:
            train(tiny_config("sd15", steps=steps, **LORA, **{"memory.frozen": "nf4"}), workdir)
    whole, parts = (losses_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    assert whole[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(whole[2] - math.log(2)) > 1e-4
    states = [
        ocp.PyTreeCheckpointer().restore((tmp_path / name / "checkpoints" / "3").absolute() / "state")
        for name in ("whole", "parts")
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)
    run = open_run(tmp_path / "whole")
    assert not any(isinstance(value, QArray) for value in run.base.values()), "exports add to the model as it is stored"


@pytest.mark.slow
def test_a_run_samples_grids_and_scans_blocks_from_quantised_weights(tiny_config: Any, tmp_path: Path) -> None:
    fields = {"memory.frozen": "int8", "sample.every": 2, "validation.every": 2, "remat": "block", "scan": True}
    train(tiny_config("flux", steps=2, **fields), tmp_path)
    assert losses_of(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert list(tmp_path.glob("**/*.png"))


@pytest.mark.slow
def test_another_reference_is_quantised_too(tiny_config: Any, tmp_path: Path) -> None:
    write_random_model("sd15", tmp_path / "other", seed=9)
    fields = {"memory.frozen": "nf4", "reference": str(tmp_path / "other")}
    frozen = experiment_of(tiny_config("sd15", **LORA, **fields), tmp_path).frozen
    assert held_bytes(frozen.reference) == held_bytes(frozen.base)
    assert not np.array_equal(frozen.whole_reference()[CONVOLUTION].qvalue, frozen.base[CONVOLUTION].qvalue)


def test_it_is_of_loras_alone_and_a_run_keeps_it(tiny_config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.memory.frozen=nf4 .* trains the whole denoiser; set lora.rank"):
        resolve(tiny_config("sd15", **{"memory.frozen": "nf4"}), device_count=1, process_count=1)
    fields = json.loads(json.dumps(flatten(default_config())))
    older = {name: value for name, value in fields.items() if name != "memory.frozen"}
    check_same_experiment(fields, older, tmp_path, default_config())
    with pytest.raises(UserError, match=r"memory.frozen was '', now 'int8'"):
        check_same_experiment(fields | {"memory.frozen": "int8"}, older, tmp_path, default_config())
