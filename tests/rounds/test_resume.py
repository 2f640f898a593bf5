"""A run stopped in sampling and in training goes on to the very parameters of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    "--config=configs/d3po.py:tiny",
    "--config.online.prompts_per_round=4",
    "--config.online.prompts_at_a_time=2",
    "--config.online.epochs=2",
    "--config.checkpoint.every=3",
    "--config.sample.every=0",
)  # two rounds of 4 prompts and 8 steps


@pytest.fixture
def online(tmp_path):
    """Runs the command, stopped or not; its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(workdir, *stop, arguments=ARGUMENTS):
        script = [str(Path(__file__).with_name("stopped_run.py")), *stop] if stop else ["-m", "dpo_jax.online"]
        command = [sys.executable, *script, *arguments, f"--workdir={tmp_path / workdir}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    return run


def parameters(workdir, step):
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / "state"
    return ocp.PyTreeCheckpointHandler().restore(folder.absolute())


def test_a_killed_run_ends_with_the_same_parameters(online, tmp_path):
    assert online("whole") == 0

    assert online("stopped", "sampled", "1", "SIGKILL") == -9  # in the middle of a batch
    assert len(list((tmp_path / "stopped/rounds/00000/trajectories").glob("*.npz"))) == 1
    assert online("stopped", "trained", "5", "SIGKILL") == -9  # between the checkpoints of steps 3 and 6
    assert online("stopped") == 0

    assert_alike(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_killed_run_draws_with_the_same_policy_again(online, tmp_path):
    """DiffusionNFT draws with a policy that lags behind; the checkpoint has both."""
    arguments = (
        *ARGUMENTS,
        "--config.loss.name=nft",
        "--config.optimizer.learning_rate=1e-2",
        "--config.loss.old_decay_rate=0.05",
    )
    assert online("whole", arguments=arguments) == 0
    assert online("stopped", "sampled", "1", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", "trained", "5", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", "sampled", "1", "SIGKILL", arguments=arguments) == -9  # of the second round
    assert online("stopped", arguments=arguments) == 0

    assert_alike(tmp_path / "whole", tmp_path / "stopped", images=(0, 32))
    whole, stopped = (parameters(tmp_path / name, 16) for name in ("whole", "stopped"))
    for name, value in whole["old"].items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(stopped["old"][name]))
    assert any(np.any(whole["old"][name] != x) for name, x in whole["params"].items())


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_ends_with_the_same_parameters(online, tmp_path):
    assert online("whole") == 0

    assert online("stopped", "sampled", "1", "SIGTERM") == 75  # when the batch is whole
    assert len(list((tmp_path / "stopped/rounds/00000/trajectories").glob("*.npz"))) == 2
    assert online("stopped", "trained", "2", "SIGTERM") == 75
    assert (tmp_path / "stopped/checkpoints/2").exists()
    assert online("stopped", "sampled", "1", "SIGTERM") == 75
    assert len(list((tmp_path / "stopped/rounds/00001/trajectories").glob("*.npz"))) == 2
    assert online("stopped") == 0

    assert_alike(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_it_knew_of_each_prompt(online, tmp_path):
    """By DDPO's statistics: of 3 prompts, which have their 16 rewards after 2 or 3 of the 6 rounds."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na red circle\n")
    arguments = (
        "--config=configs/d3po.py:compressibility,ddpo,tiny",
        f"--config.online.prompts={prompts}",
        "--config.online.rounds=6",
        "--config.online.prompts_per_round=6",
        "--config.online.candidates=4",
        "--config.data.batch_size=2",
        "--config.optimizer.learning_rate=1e-3",
        "--config.checkpoint.every=4",
        "--config.sample.every=0",
    )  # 3 steps a round
    assert online("whole", arguments=arguments) == 0
    assert online("stopped", "trained", "11", "SIGKILL", arguments=arguments) == -9  # from step 9 again, with round 3
    assert online("stopped", "sampled", "3", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", "trained", "2", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", arguments=arguments) == 0

    assert_alike(tmp_path / "whole", tmp_path / "stopped", step=18, images=[24 * number for number in range(6)])


@pytest.mark.slow
def test_a_killed_run_of_a_flow_model_ends_with_the_same_parameters(online, tmp_path):
    arguments = (
        "--config=configs/tiny_online.py:flow_grpo,tiny",
        "--config.loss.ratio=guard",
        "--config.online.window=1",
        "--config.online.prompts_at_a_time=2",
        "--config.online.epochs=2",
        "--config.checkpoint.every=3",
    )  # two rounds of 4 prompts and 4 steps
    assert online("whole", arguments=arguments) == 0
    assert online("stopped", "sampled", "1", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", "trained", "5", "SIGKILL", arguments=arguments) == -9
    assert online("stopped", arguments=arguments) == 0

    assert_alike(tmp_path / "whole", tmp_path / "stopped", step=8, images=(0, 12))


def assert_alike(first, second, step=16, images=(0, 8)):
    whole, stopped = parameters(first, step), parameters(second, step)
    assert whole["step"] == stopped["step"] == step
    assert whole["params"].keys() == stopped["params"].keys()
    trained = [np.asarray(x) for name, x in whole["params"].items() if "lora_A" not in name]
    assert any(np.any(x) for x in trained)
    for name, value in whole["params"].items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(stopped["params"][name]))
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    assert results[0] == results[1]
    assert [of_round["images"] for of_round in results[0]["rounds"]] == list(images)
    for folder in (first, second):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        noted = [row["online/round"] for row in rows if "online/round" in row]
        assert noted == list(range(len(images)))
