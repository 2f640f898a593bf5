"""The plan command, from flags to text and JSON."""

import functools
import json

import pytest

from .conftest import Command


@pytest.fixture
def plan(command: Command) -> Command:
    return functools.partial(command, "plan")


def test_json_holds_what_the_interface_promises(plan: Command) -> None:
    done = plan("--config=configs/sd15.py:lora,tiny", "--topology=v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    promised = {"hbm_gib", "hbm_limit_gib", "fits", "tflop_per_pair", "pairs_per_second_per_chip", "chip_hours"}
    assert promised <= result.keys()
    assert result["fits"]
    assert result["hbm_limit_gib"] == 15.75
    assert 0 < result["tflop_per_pair"] < 1


def test_bad_flags_are_told_in_one_sentence(plan: Command) -> None:
    done = plan("--config=configs/sd15.py:tiny", "--topology=v9:2x2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --topology=v9:2x2 is not known")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_published_models_are_planned_without_their_weights(plan: Command) -> None:
    """PyTorch's profiler counts 53.98 TFLOP per pair for SDXL with cached latents; the plan is within 0.1%."""
    done = plan(
        "--config=configs/sdxl.py", "--topology=v5p:4x4x4", "--json",
        "--config.data.encoded_views=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["trained_parameters"] == 2_567_463_684
    assert result["tflop_per_pair"] == pytest.approx(53.98, rel=1e-3)
    assert result["fits"]
