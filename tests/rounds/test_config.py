"""Each wrong config is told in a sentence; and the plan's counts are those of the networks' runs."""

import jax
import numpy as np
import pytest

from dpo_jax.cli import load_config
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rounds.config import check, make_plan, needs_reference
from dpo_jax.rounds.loop import learn
from dpo_jax.training import config as training_config

STEPS = np.arange(20, dtype=np.int32)
ALONE = {"device_count": 1, "process_count": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, r"config\.model is empty"),
        ({"online.rounds": 0}, r"online\.rounds=0 must be at least 1"),
        ({"online.prompts_per_round": 0}, r"prompts_per_round=0 must be at least 1"),
        ({"online.sampling_steps": 0}, r"sampling_steps=0 must be at least 1"),
        ({"online.epochs": -1}, r"epochs=-1 must be at least 1"),
        ({"online.timesteps": 1.5}, r"timesteps=1\.5 is a share"),
        ({"online.timesteps": 0.0}, r"timesteps=0(\.0)? trains on nothing; take a share above 0"),
        ({"online.eta": 2.0}, r"eta=2\.0 is a share"),
        ({"online.clip": -0.1}, r"clip=-0\.1 is a share"),
        ({"loss.name": "dpo"}, r"loss\.name='dpo'; choose from d3po, ddpo, dpok"),
        ({"online.combine": "sum"}, r"combine='sum'; choose from mean, pareto"),
        ({"online.update_by": "image"}, r"update_by='image'; choose from prompt, pair"),
        ({"online.reference": "last"}, r"reference='last'; choose from initial, round"),
        ({"online.advantage": "all"}, r"advantage='all'; choose from prompt, group"),
        ({"remat": "auto"}, r"remat='auto'; choose from none"),
        ({"online.candidates": 1}, r"candidates=1; there is nothing to compare: take 2 or more"),
        (
            {"online.candidates": 1, "loss.name": "ddpo", "online.advantage": "group"},
            r"candidates=1; there is nothing to compare",
        ),
        ({"online.candidates": 0, "loss.name": "ddpo"}, r"candidates=0"),
        (
            {"lora.rank": 4, "lora.dropout": 0.1},
            r"lora\.dropout=0\.1 would change the probabilities.*set lora\.dropout=0",
        ),
        ({"data.batch_size": 3}, r"prompts_per_round=4 is no multiple of data\.batch_size=3"),
        ({"loss.name": "dpok", "online.reference": "round"}, r'dpok needs a reference.*reference="initial"'),
        ({"loss.name": "ddpo", "online.update_by": "pair"}, r'update_by="pair" is D3PO.*for ddpo'),
        ({"online.branching": True, "online.update_by": "pair"}, r'update_by="pair" is D3PO.*for branching'),
        ({"online.branching": True, "loss.name": "ddpo"}, r'candidates of a step, and ddpo .*advantage="group"'),
        ({"online.branching": True, "online.judges": ()}, r"branching judges at every step, which people can't"),
        ({"online.latent_judge": "a:b"}, r"latent_judge judges single steps; set config\.online\.branching=True"),
        ({"attention": "cudnn"}, r'attention="cudnn" takes bfloat16'),
    ],
)
def test_wrong_configs_are_one_sentence(online, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        check(online(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["tiny_online", "tiny_online:ddpo", "tiny_online:grpo", "d3po", "d3po:hands", "d3po:spo"]
)
def test_the_configs_that_come_with_it_are_right(online, name):
    check(online(name))


def test_one_image_a_prompt_is_enough_for_advantages_by_prompt(online):
    check(online(**{"online.candidates": 1, "loss.name": "ddpo"}))


@pytest.mark.parametrize(
    ("fields", "machine", "message"),
    [
        ({}, {"device_count": 16}, r"batch_size=2 x 20 timesteps does not divide over 16 devices.*a multiple of 16"),
        ({"data.accumulation": 3}, {}, r"batch_size=2 x 20 timesteps does not divide over 1 devices x 3 micro-batches"),
        (
            {"online.timesteps": 1.0},
            {"device_count": 4, "process_count": 4},
            r"batch_size=2 prompts .* over 4 processes",
        ),
    ],
)
def test_what_does_not_divide_is_told(online, fields, machine, message):
    config = online(**{"online.timesteps": 1.0} | fields)
    with pytest.raises(ValueError, match=message):
        make_plan(config, STEPS, **ALONE | machine)


def per_timestep(online, **fields):
    """Training's evaluations for one prompt at one timestep, and updates."""
    fields |= {"online.candidates": 7, "online.prompts_per_round": 1, "data.batch_size": 1, "online.sampling_steps": 20}
    plan = make_plan(online(**{"online.timesteps": 1.0} | fields), STEPS, **ALONE)
    sampling = 7 * 20
    return (plan.evaluations - sampling) / 20, plan.updates


def test_seven_candidates_cost_fourteen_evaluations_at_once_and_eighty_four_in_pairs(online):
    initial = {"online.reference": "initial"}
    assert per_timestep(online, **initial) == (14, 1)
    assert per_timestep(online, **initial, **{"online.update_by": "pair"}) == (84, 21)
    assert per_timestep(online, **{"online.reference": "round"}) == (7, 1)
    assert per_timestep(online, **{"online.reference": "round", "online.update_by": "pair"}) == (42, 21)
    assert per_timestep(online, **initial, **{"loss.name": "ddpo"}) == (7, 1)
    assert per_timestep(online, **initial, **{"loss.name": "dpok"}) == (14, 1)


def test_two_candidates_are_one_pair_however_they_are_updated(online):
    fields = {"online.candidates": 2}
    plans = [
        make_plan(online(**fields, **{"online.update_by": update}), STEPS, **ALONE) for update in ("prompt", "pair")
    ]
    assert plans[0] == plans[1]


def test_counts_of_a_round(online):
    fields = {"online.prompts_per_round": 12, "data.batch_size": 4, "online.epochs": 2, "online.timesteps": 0.25}
    plan = make_plan(online(**fields), STEPS, device_count=2, process_count=2)
    assert (plan.timesteps, plan.pairs, plan.updates, plan.images) == (5, 1, 2 * 3, 12 * 3)
    assert (plan.derived.local_batch_size, plan.derived.micro_batch_per_device) == (10, 10)
    assert make_plan(online(**fields, **{"online.update_by": "pair"}), STEPS, **ALONE).updates == 2 * 3 * 3
    assert make_plan(online(**fields | {"online.timesteps": 0.001}), STEPS, **ALONE).timesteps == 1
    assert make_plan(online(**fields, **{"online.branching": True}), STEPS, **ALONE).images == 12 * (3 * 20 + 1)
    in_latents = {"online.branching": True, "online.latent_judge": "tuned:base"}
    assert make_plan(online(**fields, **in_latents), STEPS, **ALONE).images == 12


def test_who_needs_a_reference(online):
    for name, reference, needs in [
        ("d3po", "initial", True),
        ("d3po", "round", False),
        ("ddpo", "initial", False),
        ("ddpo", "round", False),
        ("dpok", "initial", True),
    ]:
        assert needs_reference(online(**{"loss.name": name, "online.reference": reference})) == needs


@pytest.mark.parametrize(
    "fields",
    [
        {"online.epochs": 2, "online.timesteps": 0.5},
        {"online.update_by": "pair", "online.reference": "round"},
        {"online.branching": True},
    ],
    ids=["at once", "pairs", "branching"],
)
def test_evaluations_are_those_that_the_network_makes(online, tmp_path, monkeypatch, fields):
    """By a network that counts its rows instead of looking at images."""
    rows = []

    def counting(self, unet, x_NHWC, t_N, conditioning, dropout_keys_N=None):
        jax.debug.callback(lambda: rows.append(len(x_NHWC)))
        trained = sum(value.mean() for name, value in unet.items() if "lora" in name)
        return (0.9 + trained) * x_NHWC + conditioning.context_NLD.mean()

    monkeypatch.setattr(Pipeline, "denoise", counting)
    config = online("d3po:tiny", **{"online.guidance": 1.0, "online.candidates": 3, "sample.every": 0} | fields)
    learn(config, tmp_path)
    jax.effects_barrier()

    plan = make_plan(config, np.arange(config.online.sampling_steps), **ALONE)
    assert sum(rows) == plan.evaluations * config.online.rounds


def test_commands_for_data_sets_refuse_an_online_config():
    config = load_config("configs/d3po.py:tiny")
    with pytest.raises(ValueError, match=r"this config is for dpo_jax\.online; give one for a data set"):
        training_config.check(config)
