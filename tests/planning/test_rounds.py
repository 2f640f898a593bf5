"""Plans of online learning: memory of drawing and of training, and the work of a round."""

import json

import numpy as np
import pytest

from dpo_jax.cli import load_config, replaced
from dpo_jax.planning.report import rounds_text
from dpo_jax.planning.rounds import plan_rounds
from dpo_jax.planning.topology import GIB, parse_topology

from ..conftest import ROOT


@pytest.fixture(scope="module")
def config():
    config = load_config(f"{ROOT}/configs/nft.py:sd15,tiny")
    config.lora.rank = 0  # or the policies would be too small to see
    return config


@pytest.fixture(scope="module")
def plan(config):
    return plan_rounds(config, parse_topology("h100:1"))


def test_memory_and_work_are_those_of_drawing_and_training(config, plan) -> None:
    step, prompts, K = plan.step, config.online.prompts_per_round, config.online.candidates
    trained = 4 * step.trained_parameters
    assert step.memory["trained weights, float32"] == trained
    assert step.memory["policy that draws"] == 2 * trained  # and once more in the compute dtype, also float32
    state = trained * (2 + 2 + 1) + step.memory["reference and frozen denoiser"]
    assert plan.sampling["training state"] == pytest.approx(state, abs=100)  # numbers of steps
    assert step.memory["reference and frozen denoiser"] == trained  # it reads the reference
    assert plan.sizes.images == prompts * K
    assert step.batch_size == config.data.batch_size * plan.sizes.timesteps
    networks = 3
    steps = config.online.sampling_steps
    assert plan.sizes.evaluations == prompts * K * (steps + plan.sizes.timesteps * networks)
    assert plan.sampling_seconds > 0
    assert plan.hbm_bytes == max(step.hbm_bytes, sum(plan.sampling.values()))


@pytest.mark.slow
def test_more_prompts_at_a_time_take_more_memory_and_no_more_work(config, plan) -> None:
    drawing = f"drawing {2 * config.online.candidates} images"
    one = plan_rounds(replaced(config, {"online.prompts_at_a_time": 1}), parse_topology("h100:1"))
    alone = one.sampling[f"drawing {config.online.candidates} images"]
    assert plan.sampling[drawing] == pytest.approx(2 * alone, rel=0.1)
    assert one.sampling_seconds == pytest.approx(plan.sampling_seconds, rel=0.02)
    assert one.step.memory == plan.step.memory


def test_text_and_json(config, plan) -> None:
    text = rounds_text(config, plan)
    assert f"{plan.step.batch_size} prompts x timesteps per step" in text
    assert "policy that draws" in text
    assert f"A round: {plan.sizes.images} images" in text
    assert f"of {plan.step.topology.device.usable_gib:.1f}: fits" in text
    found = json.loads(json.dumps(plan.to_json()))
    assert found["fits"]
    assert np.isclose(found["hbm_gib"] * GIB, plan.hbm_bytes)
