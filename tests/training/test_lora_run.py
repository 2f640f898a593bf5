"""Complete LoRA runs: what is trained, what it is compared with, and that PyTorch computes the same from the result."""

import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from diffusers.training_utils import EMAModel

from dpo_jax.batch import Conditioning
from dpo_jax.models.random_model import write_random_model
from dpo_jax.training.config import resolve
from dpo_jax.training.data import make_inputs, open_training_batches
from dpo_jax.training.experiment import build
from dpo_jax.training.export import export, exportable_run
from dpo_jax.training.model import load_encoders, make_generator, open_model
from dpo_jax.training.run import open_run
from dpo_jax.training.step import moving_average
from dpo_jax.training.trainer import train

FIELDS = {"lora.rank": 4, "lora.alpha": 2.0, "optimizer.learning_rate": 1e-2, "optimizer.scale_by_batch": False}
FIELDS |= {"optimizer.schedule": "constant", "loss.beta": 100.0}


def losses_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def inputs():
    random = np.random.default_rng(0)
    x_NHWC, context_NLD = random.normal(size=(2, 8, 8, 4)), random.normal(size=(2, 5, 32))
    return x_NHWC.astype(np.float32), np.array([10, 900]), Conditioning(context_NLD.astype(np.float32))


def torch_output(unet, x_NHWC, t_N, conditioning):
    x_NCHW = torch.tensor(x_NHWC).permute(0, 3, 1, 2)
    with torch.no_grad():
        output = unet(x_NCHW, torch.tensor(t_N), torch.tensor(conditioning.context_NLD))
    return output.sample.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """A LoRA trained for 20 steps."""
    workdir = tmp_path_factory.mktemp("lora")
    train(tiny_config("sd15", steps=20, **FIELDS, **{"checkpoint.every": 10}), workdir)
    return workdir


def test_20_steps_of_lora_give_the_same_output_in_pytorch_peft(trained, tmp_path):
    run = open_run(trained)
    assert run.step == 20
    args = inputs()
    ours, base = (np.asarray(run.pipeline.denoise(p, *jax.tree.map(jnp.asarray, args))) for p in (run.policy, run.base))
    assert np.abs(ours - base).max() > 0.02  # it has learnt something

    tuned = exportable_run(trained)
    for format in ("lora", "kohya", "diffusers"):
        file = export(tuned, tmp_path / format, format=format, dtype=None, max_shard_bytes=10**10)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(file if format == "diffusers" else run.pipeline.folder)
        if format != "diffusers":
            np.testing.assert_allclose(torch_output(pipe.unet, *args), base, rtol=1e-4, atol=1e-5)
            pipe.load_lora_weights(file)
        np.testing.assert_allclose(torch_output(pipe.unet, *args), ours, rtol=1e-4, atol=1e-5)


def test_a_run_is_drawn_with_and_takes_a_further_lora(trained, tmp_path):
    run = open_run(trained)
    captions, seeds = ["a red circle", "a blue square"], [1, 2]

    def draw(opened):
        return opened.generator(opened.sampling, resolution=opened.resolution, batch_size=2)(
            opened.denoiser, captions, seeds
        ).astype(int)

    encoders = load_encoders(run.config, run.pipeline, run.placement)
    generator = make_generator(run.config, run.pipeline, lambda: encoders, run.placement, 2)  # as in training
    tuned = draw(run.load_model())
    np.testing.assert_array_equal(tuned, generator(run.policy, captions, seeds))
    file = export(exportable_run(trained), tmp_path / "lora", format="lora", dtype=None, max_shard_bytes=10**10)
    undone = draw(run.load_model(lora=str(file), lora_scale=-1.0))  # its own, taken away again
    assert np.abs(undone - generator(run.base, captions, seeds)).max() <= 1
    assert np.abs(undone - tuned).max() > 10
    assert run.load_model().fingerprint != run.load_model(lora=str(file)).fingerprint


def test_only_the_adapter_is_trained_and_checkpointed(trained):
    state = ocp.PyTreeCheckpointer().restore((trained / "checkpoints" / "20").absolute() / "state")
    assert {name.split(".")[-2] for name in state["params"]} == {"lora_A", "lora_B"}
    arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
    numbers = sum(array.size for array in arrays)
    assert numbers < 3.2 * sum(np.asarray(x).size for x in state["params"].values())  # with AdamW's two moments
    assert any(np.abs(value).max() > 1e-3 for name, value in state["params"].items() if "lora_B" in name)


def test_policy_is_the_reference_at_step_0_and_no_second_copy(tiny_config, tmp_path):
    config = tiny_config("sd15", **FIELDS)
    experiment = build(config, resolve(config, device_count=1, process_count=1), open_model(config, tmp_path))
    assert experiment.frozen.encoders.keys() == {"vae", "text_encoder"}
    assert not experiment.frozen.reference
    policy = experiment.frozen.policy(experiment.initial_state().params)
    args = jax.tree.map(jnp.asarray, inputs())
    ours, reference = jax.jit(lambda *params: [experiment.pipeline.denoise(p, *args) for p in params])(
        policy, experiment.frozen.whole_reference()
    )
    assert np.array_equal(ours, reference)


def test_dropout_acts_in_training_alone_and_on_the_policy_alone(tiny_config, tmp_path):
    config = tiny_config("sd15", **FIELDS, **{"lora.dropout": 0.5})
    experiment = build(config, resolve(config, device_count=1, process_count=1), open_model(config, tmp_path))
    adapter = {name: value + 0.1 for name, value in experiment.initial_state().params.items()}
    with open_training_batches(config, experiment.derived, make_inputs(config, experiment.pipeline)) as batches:
        batch = jax.device_put(next(batches))
    score = jax.jit(
        lambda step: [experiment.compare(adapter, experiment.frozen, batch, step, training=t) for t in (True, False)]
    )
    trained, evaluated = score(jnp.int32(3))
    np.testing.assert_array_equal(trained.reference_error_BK, evaluated.reference_error_BK)
    assert (trained.error_BK != evaluated.error_BK).all()
    again, _ = score(jnp.int32(3))
    np.testing.assert_array_equal(trained.error_BK, again.error_BK)


def test_after_resume_the_reference_is_still_the_base(tiny_config, trained, tmp_path):
    assert losses_of(trained)[0] == pytest.approx(math.log(2), abs=1e-5)
    config = tiny_config("sd15", steps=10, **FIELDS, **{"checkpoint.every": 10})
    train(config, tmp_path)
    config.steps = 20
    train(config, tmp_path)
    # Were the reference what was trained so far, the losses would begin at log 2 again.
    assert losses_of(tmp_path) == losses_of(trained)
    states = [
        ocp.PyTreeCheckpointer().restore((w / "checkpoints" / "20").absolute() / "state") for w in (trained, tmp_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_going_on_from_a_lora(tiny_config, trained, tmp_path):
    """With the LoRA in the policy alone, the margin begins where it ended; with it in both, at zero.

    Its rank is kept, and alpha / rank is part of the exported weights.
    """
    file = export(exportable_run(trained), tmp_path / "lora", format="kohya", dtype=None, max_shard_bytes=10**10)
    first = {}
    for init_reference in (False, True):
        fields = {"lora.init": str(file), "lora.init_reference": init_reference, "model": str(trained / "model")}
        workdir = tmp_path / str(init_reference)
        train(tiny_config("sd15", steps=1, **(FIELDS | {"lora.rank": 0}), **fields), workdir)
        first[init_reference] = losses_of(workdir)[0]
        run = open_run(workdir)
        assert {(size.rank, size.alpha) for size in run.pipeline.adapters.values()} == {(4, 4.0)}
        assert json.loads((workdir / "config.json").read_text())["fingerprints.lora"]
        assert any(np.any(value) for name, value in run.base.items() if ".lora_B." in name)
    assert first[True] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first[False] - math.log(2)) > 1e-3


def test_a_lora_for_another_model(tiny_config, trained, tmp_path):
    file = export(exportable_run(trained), tmp_path / "lora", format="lora", dtype=None, max_shard_bytes=10**10)
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors") as error:
        train(tiny_config("sdxl", steps=1, **{"lora.init": str(file)}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_rank_that_the_lora_does_not_have(tiny_config, trained, tmp_path):
    file = export(exportable_run(trained), tmp_path / "lora", format="lora", dtype=None, max_shard_bytes=10**10)
    with pytest.raises(ValueError, match=r"config.lora.rank=8, but .* has rank \[4\]; set lora.rank=0"):
        train(tiny_config("sd15", steps=1, **{"lora.rank": 8, "lora.init": str(file)}), tmp_path / "run")


@pytest.mark.slow
def test_another_reference_and_another_starting_unet(tiny_config, tmp_path):
    """Both are read from their own paths: policy = reference only if these hold the same weights."""
    write_random_model("sd15", tmp_path / "other", seed=9)
    first = {}
    for fields in ({"reference": str(tmp_path / "other")}, {"unet": str(tmp_path / "other" / "unet")}, {}):
        workdir = tmp_path / "_".join(fields)
        train(tiny_config("sd15", steps=1, **fields), workdir / "run")
        first["".join(fields)] = losses_of(workdir / "run")[0]
    assert abs(first["reference"] - math.log(2)) > 0.1
    assert [first["unet"], first[""]] == pytest.approx([math.log(2)] * 2, abs=3e-3)  # rounding, times beta = 5000
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "other", subfolder="unet")
    args = inputs()
    run = open_run(tmp_path / "unet" / "run")
    ours = run.pipeline.denoise(run.base, *jax.tree.map(jnp.asarray, args))
    np.testing.assert_allclose(ours, torch_output(theirs, *args), rtol=1e-4, atol=1e-5)


def test_moving_average_is_that_of_diffusers():
    random = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.tensor(random.normal(size=5)))
    theirs = EMAModel([parameter], decay=0.5)
    ours = {"x": jnp.asarray(parameter.detach().numpy(), jnp.float32)}
    for step in range(8):
        parameter.data = torch.tensor(random.normal(size=5))
        theirs.step([parameter])
        ours = moving_average(ours, {"x": jnp.asarray(parameter.detach().numpy())}, jnp.int32(step), 0.5)
        np.testing.assert_allclose(ours["x"], theirs.shadow_params[0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_a_moving_average_and_reference_exports_the_average_and_resumes(tiny_config, tmp_path):
    fields = {"ema.decay": 0.9, "moving_reference.every": 2, "validation.every": 2}
    for workdir, stops in ((tmp_path / "whole", [4]), (tmp_path / "halves", [2, 4])):
        for steps in stops:
            train(tiny_config("sd15", steps=steps, **FIELDS, **fields), workdir)
    state = [
        ocp.PyTreeCheckpointer().restore((tmp_path / name / "checkpoints" / "4").absolute() / "state")
        for name in ("whole", "halves")
    ]
    jax.tree.map(np.testing.assert_array_equal, *state)
    losses = np.array(losses_of(tmp_path / "halves"))
    assert (np.abs(losses - math.log(2)) < 1e-5).tolist() == [True, False, True, False], "the reference is renewed"
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    errors = [row["validation/error_reference_winner"] for row in rows if "validation/error_reference_winner" in row]
    assert len(errors) == 3
    assert errors[0] == errors[1] != errors[2], "held-out pairs are compared with the reference of the training"
    params, average = state[0]["params"], state[0]["ema"]
    assert any(not np.array_equal(params[name], average[name]) for name in params)
    run = open_run(tmp_path / "whole")
    for name, value in run.params.items():
        np.testing.assert_array_equal(value, average[name])
