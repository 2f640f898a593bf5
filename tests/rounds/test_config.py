"""Each wrong config is told in a sentence; and the plan's counts are those of the networks' runs."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax.cli import load_config
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rewards import JUDGES
from dpo_jax.rounds.config import check, first_branch, needs_reference, round_sizes
from dpo_jax.rounds.loop import learn
from dpo_jax.rounds.method import sampler_table
from dpo_jax.sampling.prompts import read_prompts
from dpo_jax.training import config as training_config

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = np.arange(20, dtype=np.int32)
ALONE = {"device_count": 1, "process_count": 1}
PUBLISHED = {"data.batch_size": 1, "data.micro_batch": 1, "online.prompts_per_round": 20}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, r"config\.model is empty"),
        ({"online.rounds": 0}, r"online\.rounds=0 must be at least 1"),
        ({"online.prompts_per_round": 0}, r"prompts_per_round=0 must be at least 1"),
        ({"online.sampling_steps": 0}, r"sampling_steps=0 must be at least 1"),
        ({"online.epochs": -1}, r"epochs=-1 must be at least 1"),
        ({"online.timesteps": 1.5}, r"timesteps=1\.5 must be above 0 and at most 1$"),
        ({"online.timesteps": 0.0}, r"timesteps=0\.0 must be above 0 and at most 1$"),
        ({"online.eta": 2.0}, r"eta=2\.0 must be a share, from 0 to 1$"),
        ({"online.clip": -0.1}, r"clip=-0\.1 must be strictly between 0 and 1$"),
        ({"online.clip": 1.0}, r"clip=1\.0 must be strictly between 0 and 1$"),
        ({"online.clip": 0.0}, r"clip=0\.0 must be strictly between 0 and 1$"),
        ({"online.guidance": -1.0}, r"guidance=-1\.0 must be at least 0$"),
        ({"loss.beta": -0.1}, r"loss\.beta=-0\.1 must be above 0$"),
        ({"loss.name": "ddpo", "loss.clip": -1e-4}, r"loss\.clip=-0\.0001 must be above 0$"),
        ({"sample.sampler": "ddmi"}, r"sample\.sampler='ddmi' must be one of .*'ddim'"),
        ({"online.sampler": "ddmi"}, r"online\.sampler='ddmi' must be one of .*'ddim'"),
        ({"steps": 100}, r"config\.steps=100, but .* set online\.rounds"),
        (
            {"online.best_and_worst": True, "online.update_by": "pair"},
            r"best_and_worst keeps only one pair\. Set update_by",
        ),
        (
            {"reference": "FOLDER", "online.reference": "round"},
            r'config\.reference=FOLDER .*online\.reference="round" uses none. Remove the field',
        ),
        ({"reference": "FOLDER", "loss.name": "ddpo"}, r"config\.reference=FOLDER .*but ddpo uses none"),
        (
            {"lora.init": "FILE", "lora.init_reference": True, "online.reference": "round"},
            r"config\.lora\.init_reference=True",
        ),
        (
            {"online.best_and_worst": True, "loss.name": "ddpo"},
            r"best_and_worst keeps one pair of candidates, but ddpo learns from all",
        ),
        ({"loss.beta": 0.0}, r"loss\.beta=0\.0 must be above 0$"),
        ({"loss.name": "ddpo", "loss.advantage_clip": 0.0}, r"loss\.advantage_clip=0\.0 must be above 0$"),
        ({"seed": -1}, r"config\.seed=-1"),
        ({"online.branch_after": 0.2}, r"branch_after=0\.2 .*with online\.branching=True"),
        ({"online.margin": 0.3}, r"margin=0\.3 .*needs online\.best_and_worst=True"),
        ({"loss.name": "dpo"}, r"dpo learns from a data set, with dpo_jax\.train"),
        ({"loss.name": "ddop"}, r"config\.loss\.name='ddop' is not a method\. Did you mean ddpo\?"),
        ({"data.path": "runs/data"}, r"config\.data\.path=runs/data has no effect: d3po learns from images that"),
        ({"loss.log_snr_buckets": 10}, r"config\.loss\.log_snr_buckets=10 has no effect"),
        ({"loss.timestep_shift": 3.0}, r"config\.loss\.timestep_shift=3\.0 has no effect"),
        ({"loss.inversion_steps": 10}, r"config\.loss\.inversion_steps=10 has no effect"),
        ({"validation.every": 5}, r"config\.validation\.every=5, but there are no held-out pairs"),
        ({"data.micro_batch": 0}, r"config\.data\.micro_batch=0 lets a plan choose"),
        ({"online.combine": "sum"}, r"combine='sum' must be one of 'mean', 'pareto'"),
        ({"online.update_by": "image"}, r"update_by='image' must be one of 'prompt', 'pair'"),
        ({"online.reference": "last"}, r"reference='last' must be one of 'initial', 'round'"),
        ({"online.advantage": "all"}, r"advantage='all' must be one of 'prompt', 'group'"),
        ({"remat": "auto"}, r"config\.remat=auto lets a plan choose"),
        ({"online.candidates": 1}, r"candidates=1 leaves nothing to compare\. Set it to 2 or more"),
        (
            {"online.candidates": 1, "loss.name": "ddpo", "online.advantage": "group"},
            r"candidates=1 leaves nothing to compare",
        ),
        ({"online.candidates": 0, "loss.name": "ddpo"}, r"candidates=0"),
        (
            {"lora.rank": 4, "lora.dropout": 0.1},
            r"lora\.dropout=0\.1 would change the probabilities.*set lora\.dropout=0",
        ),
        ({"data.batch_size": 3}, r"prompts_per_round=4 is not divisible by data\.batch_size=3"),
        ({"loss.name": "dpok", "online.reference": "round"}, r'dpok" needs a reference network.*reference="initial"'),
        ({"loss.name": "ddpo", "online.update_by": "pair"}, r'update_by="pair" works only with D3PO.*for ddpo'),
        (
            {"online.branching": True, "online.update_by": "pair"},
            r'update_by="pair" works only with D3PO.*for branching',
        ),
        ({"online.branching": True, "loss.name": "ddpo"}, r'candidates of a step, but ddpo .*advantage="group"'),
        ({"online.branching": True, "online.judges": ()}, r"branching judges every step, which people cannot do"),
        (
            {"online.train_guided": False, "online.reference": "round"},
            r'train_guided=False computes .* online\.reference="round" .*\. Set online\.train_guided=True',
        ),
        ({"online.train_guided": False, "loss.name": "ddpo"}, r'train_guided=False .* loss\.name="ddpo" and'),
        ({"online.train_guided": False, "loss.name": "flow_grpo"}, r'train_guided=False .* loss\.name="flow_grpo" and'),
        ({"loss.name": "flow_grpo", "online.reference": "round"}, r"kl_weight=0\.004 needs a reference network\. Set"),
        (
            {"loss.name": "flow_grpo", "loss.divergence": "released", "online.sampler": "flow_cps"},
            r'divergence="released" is that of the steps of flow_sde, .* Set loss\.divergence="exact"$',
        ),
        (
            {"online.evaluate_every": 2, "online.judges": ()},
            r"evaluate_every=2 needs judges, but online\.judges is empty",
        ),
        (
            {"online.latent_judge": "a:b"},
            r"latent_judge judges single steps, so it needs config\.online\.branching=True",
        ),
        ({"online.window": 3, "online.sampling_steps": 4}, r"window=3 must fit into the first half .* to at most 2$"),
        (
            {"online.window": 1, "online.branching": True, "loss.name": "spo"},
            r"window=1 does not go with online\.branching\. Set it to 0$",
        ),
        (
            {"online.window": 1, "loss.name": "nft"},
            r"window=1 does not go with nft, which learns from the images alone",
        ),
        (
            {"online.window": 1, "online.sampler": "euler_ancestral"},
            r"window=1 is for the samplers ddim, flow_sde, flow_cps, but online\.sampler=euler_ancestral\.",
        ),
        ({"attention": "cudnn"}, r'attention="cudnn" takes bfloat16'),
    ],
)
def test_wrong_configs_are_one_sentence(online, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        check(online(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "sampler", "message"),
    [
        (
            FLOW,
            "ddim",
            r"sampler=ddim cannot sample .*, which is a flow model\. Set online\.sampler to flow_cps or flow_sd",
        ),
        (BETAS, "flow_sde", r"sampler=flow_sde cannot sample .*, which is not a flow model\. Set .* to ddim$"),
        (FLOW, "flow_euler", r"this sampler adds no noise.* flow_sde or flow_cps for flow models$"),
    ],
)
def test_a_sampler_for_other_models_is_one_sentence(online, schedule, sampler, message):
    pipeline = SimpleNamespace(
        sampling_schedule=make_schedule(schedule | {"num_train_timesteps": 1000}),
        vae_factor=8,
        denoiser=SimpleNamespace(config=SimpleNamespace(size_multiple=2)),
    )
    with pytest.raises(UserError, match=message):
        sampler_table(online(**{"online.sampler": sampler}), pipeline)


@pytest.mark.parametrize(
    "name",
    [
        *("tiny_online", "tiny_online:ddpo", "tiny_online:grpo", "tiny_online:lpo", "tiny_online:flow"),
        "tiny_online:guarded",
        *("flow_grpo", "flow_grpo:cps", "flow_grpo:flux", "flow_grpo:cps,flux", "tiny_online:flow_grpo"),
        *("flow_grpo:fast", "flow_grpo:cps,fast", "flow_grpo:guard"),
        *("d3po", "d3po:ddpo", "d3po:dpok", "d3po:grpo", "d3po:spo", "d3po:lpo", "d3po:hands", "d3po:safety"),
    ],
)
def test_the_configs_that_come_with_it_are_right(online, name):
    check(online(name))


@pytest.mark.parametrize(
    ("task", "judges", "prompts", "rounds", "images"),
    [
        ("", ("jpeg_compressibility",), "ddpo_animals", 400, 40),
        ("compressibility", ("jpeg_compressibility",), "ddpo_animals", 400, 40),
        ("incompressibility", ("jpeg_incompressibility",), "ddpo_animals", 400, 40),
        ("aesthetic", ("aesthetic",), "ddpo_animals", 1000, 16),
        ("alignment", ("pickscore",), "ddpo_animal_activities", 400, 40),
        ("hands", (), "hands", 5, 140),
        ("safety", (), "bundled", 5, 140),
        ("compressibility,ddpo", ("jpeg_compressibility",), "ddpo_animals", 400, 20),
    ],
)
def test_tasks_have_the_published_judges_prompts_and_sizes(online, task, judges, prompts, rounds, images):
    config = online(f"d3po:{task}")
    assert (config.online.judges, config.online.prompts, config.online.rounds) == (judges, prompts, rounds)
    plan = round_sizes(config, STEPS, **ALONE)
    assert plan.images == images
    assert plan.updates == plan.pairs * config.online.prompts_per_round
    assert len(read_prompts(prompts)) >= config.online.prompts_per_round
    assert all(judge in JUDGES for judge in judges)
    assert config.online.prompts_per_round % config.online.prompts_at_a_time == 0, "or what is computed is not all used"


def test_tiny_keeps_what_a_task_is_but_for_networks(online):
    for task, judges in (
        ("incompressibility", ("jpeg_incompressibility",)),
        ("aesthetic", ("jpeg_compressibility",)),
        ("alignment", ("jpeg_compressibility",)),
        ("hands", ()),
    ):
        config = online(f"d3po:{task},tiny")
        assert config.online.judges == judges
        assert config.online.prompts == online(f"d3po:{task}").online.prompts


def test_spo_parts_where_its_released_code_does(online):
    config = online("d3po:spo")
    assert (first_branch(config), config.online.candidates, config.optimizer.learning_rate) == (4, 4, 6e-5)
    assert first_branch(online("tiny_online:spo")) == 0
    plan = round_sizes(config, STEPS[4:], **ALONE)
    assert plan.timesteps == 16
    assert plan.images == 20 * (4 * 16 + 1)
    assert plan.evaluations == 20 * (20 + 4 * 16 + 2 * 16)


def test_one_image_a_prompt_is_enough_for_advantages_by_prompt(online):
    check(online(**{"online.candidates": 1, "loss.name": "ddpo"}))


@pytest.mark.parametrize(
    ("fields", "machine", "message"),
    [
        ({}, {"device_count": 16}, r"batch_size=2 x 20 timesteps is not divisible by 16 devices\..*batch_size to 4$"),
        (PUBLISHED, {"device_count": 8}, r"batch_size=1 x 20 timesteps .* 8 devices\. Set data\.batch_size to 2$"),
        (
            {"data.batch_size": 4, "online.timesteps": 0.95},
            {"device_count": 3},
            r"batch_size=4 x 19 timesteps .* Set data\.batch_size to 3 or 6$",
        ),
        (
            {"online.timesteps": 1.0},
            {"device_count": 4, "process_count": 4},
            r"batch_size=2 \(prompts\) is not divisible by 4 processes\. Set it to a multiple of 4",
        ),
    ],
)
def test_what_does_not_divide_is_told(online, fields, machine, message):
    config = online(**{"online.timesteps": 1.0} | fields)
    with pytest.raises(ValueError, match=message):
        round_sizes(config, STEPS, **ALONE | machine)


@pytest.mark.parametrize(
    ("config", "fields", "devices", "expected"),  # samples per device at a time, micro-batches
    [
        ("d3po", {}, 1, (1, 20)),
        ("d3po", {}, 4, (1, 5)),
        ("d3po", {"data.batch_size": 2}, 8, (1, 5)),
        ("d3po", {"data.micro_batch": 3}, 1, (2, 10)),
        ("d3po", {"online.timesteps": 0.95, "data.micro_batch": 4}, 1, (1, 19)),
        ("d3po:tiny", {}, 1, (20, 1)),
    ],
)
def test_prompts_and_timesteps_are_divided_over_devices(online, config, fields, devices, expected):
    derived = round_sizes(online(config, **fields), STEPS, device_count=devices, process_count=1).derived
    assert (derived.micro_batch_per_device, derived.accumulation) == expected


def per_timestep(online, **fields):
    """Training's evaluations for one prompt at one timestep, and updates."""
    fields |= {"online.candidates": 7, "online.prompts_per_round": 1, "data.batch_size": 1, "online.sampling_steps": 20}
    plan = round_sizes(online(**{"online.timesteps": 1.0} | fields), STEPS, **ALONE)
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
        round_sizes(online(**fields, **{"online.update_by": update}), STEPS, **ALONE) for update in ("prompt", "pair")
    ]
    assert plans[0] == plans[1]


def test_counts_of_a_round(online):
    fields = {"online.prompts_per_round": 12, "data.batch_size": 4, "online.epochs": 2, "online.timesteps": 0.25}
    plan = round_sizes(online(**fields), STEPS, device_count=2, process_count=2)
    assert (plan.timesteps, plan.pairs, plan.updates, plan.images) == (5, 1, 2 * 3, 12 * 3)
    assert (plan.derived.local_batch_size, plan.derived.micro_batch_per_device) == (10, 10)
    assert round_sizes(online(**fields, **{"online.update_by": "pair"}), STEPS, **ALONE).updates == 2 * 3 * 3
    assert round_sizes(online(**fields | {"online.timesteps": 0.001}), STEPS, **ALONE).timesteps == 1
    assert round_sizes(online(**fields, **{"online.branching": True}), STEPS, **ALONE).images == 12 * (3 * 20 + 1)
    in_latents = {"online.branching": True, "online.latent_judge": "tuned:base"}
    assert round_sizes(online(**fields, **in_latents), STEPS, **ALONE).images == 12


def test_who_needs_a_reference(online):
    for name, reference, needs in [
        ("d3po", "initial", True),
        ("d3po", "round", False),
        ("ddpo", "initial", False),
        ("ddpo", "round", False),
        ("dpok", "initial", True),
        ("flow_grpo", "initial", True),
    ]:
        assert needs_reference(online(**{"loss.name": name, "online.reference": reference})) == needs


@pytest.mark.parametrize(
    "fields",
    [
        {"online.epochs": 2, "online.timesteps": 0.5},
        {"online.update_by": "pair", "online.reference": "round"},
        {"online.branching": True, "online.branch_after": 0.25},
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

    plan = round_sizes(config, np.arange(first_branch(config), config.online.sampling_steps), **ALONE)
    assert sum(rows) == plan.evaluations * config.online.rounds


def test_commands_for_data_sets_refuse_an_online_config():
    config = load_config("configs/d3po.py:tiny")
    with pytest.raises(
        ValueError,
        match=r"^d3po learns from images that the model draws.* Give a config for a data set",
    ):
        training_config.check(config)
