"""`--step=N` and `--step=best`: which checkpoint of a training run a command reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_jax.cli import replaced
from dpo_jax.training.checkpoint import Checkpoints, restore_params
from dpo_jax.training.config import default_config
from dpo_jax.training.metrics import last_validation
from dpo_jax.training.run import Run
from dpo_jax.training.select_step import select_step

from .test_faults import abstract, state_at, zero


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the checkpoints of steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("run")
    manager = Checkpoints(workdir, keep=3)
    for step in (2, 4, 6):
        manager.save(state_at(step), {"position": step})
    manager.close()
    return workdir


@pytest.fixture
def run(checkpoints: Path, tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").symlink_to(checkpoints / "checkpoints")
    return tmp_path


def write_figures(workdir: Path, name: str, by_step: dict[int, float]) -> None:
    rows = [{"step": 1, "train/loss": 0.7}, *({"step": step, name: value} for step, value in by_step.items())]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_weights_of_one_step_are_read(run: Path) -> None:
    assert select_step(run, "") is None
    assert select_step(run, "4") == 4
    for wanted, expected in ((None, 6), (4, 4)):
        params, step = restore_params(run, abstract().params, "params", wanted)
        assert step == expected
        np.testing.assert_array_equal(params["a.kernel"], state_at(expected).params["a.kernel"])


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("validation/pair_accuracy", {2: 0.6, 4: 0.8, 6: 0.7}, 4),
        ("validation/pair_accuracy", {2: 0.8, 4: 0.8, 6: 0.7}, 2),
        ("validation/pair_accuracy", {3: 0.9, 4: 0.6, 6: 0.7}, 6),
        ("validation/pair_accuracy", {2: float("nan"), 4: 0.6, 6: 0.7}, 6),
        ("validation/error_winner", {0: 0.5, 2: 0.3, 4: 0.2, 6: 0.4}, 4),
    ],
)
def test_best_is_the_checkpoint_with_the_best_held_out_figure(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, values: dict[int, float], best: int
) -> None:
    write_figures(run, name, values)
    assert select_step(run, "best") == best
    told = capsys.readouterr().err
    label = name.removeprefix("validation/")
    assert told.startswith(f"step {best} has the best held-out {label} of the checkpoints: {values[best]}\n")
    lost = f"warning: {label} was better at step 3 (0.9), but there is no checkpoint of that step\n"
    assert (lost in told) == (3 in values)
    assert last_validation(run, best)["step"] == best


def test_the_result_of_online_learning_names_the_best_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def name(number: int, step: int) -> None:
        (run / "result.json").write_text(json.dumps({"rounds": [], "best": {"round": number, "step": step}}))

    name(2, 4)
    assert select_step(run, "best") == 4
    assert capsys.readouterr().err == "step 4 drew the best images, those of round 3\n"
    name(0, 0)
    with pytest.raises(ValueError, match=r"are those of round 1, but the model drew them before training; its checkpo"):
        select_step(run, "best")
    name(4, 8)
    with pytest.raises(
        ValueError, match=r"are those of round 5, but there is no checkpoint of step 8; its checkpoints"
    ):
        select_step(run, "best")
    (run / "result.json").write_text('{"rounds": []}')
    write_figures(run, "validation/pair_accuracy", {2: 0.6})
    assert select_step(run, "best") == 2


def test_what_cannot_be_read_is_told_with_the_steps_that_there_are(run: Path) -> None:
    for step, message in (
        ("3", r"--step=3: .* has no checkpoint of that step; its checkpoints are of steps 2, 4, 6$"),
        ("newest", r"--step=newest is not a step; give its number, or --step=best$"),
        ("best", r"has no figures of held-out data in metrics\.jsonl; its checkpoints are of steps 2, 4, 6$"),
    ):
        with pytest.raises(ValueError, match=message):
            select_step(run, step)
    write_figures(run, "validation/pair_accuracy", {1: 0.5, 3: 0.6})
    with pytest.raises(ValueError, match=r"held-out figures of steps 1, 3, but no checkpoint of these; its checkp"):
        select_step(run, "best")
    with pytest.raises(ValueError, match=r"it has no checkpoint yet$"):
        select_step(run / "nowhere", "1")


def test_a_damaged_checkpoint_that_was_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    manager = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        manager.save(state_at(step), {"position": step})
    manager.close()
    zero(tmp_path / "checkpoints" / "2" / "checksums" / "metadata")
    with pytest.raises(ValueError, match=r"checkpoints/2 is damaged: .*; there are checkpoints of other steps: 1$"):
        restore_params(tmp_path, abstract().params, "params", 2)
    assert restore_params(tmp_path, abstract().params, "params")[1] == 1


def test_a_run_that_continues_with_other_free_fields_is_the_same_model() -> None:
    def fingerprint(**fields: object) -> str:
        config = replaced(default_config(), {"fingerprints.model": "a"} | fields)
        nothing: Any = None
        return Run(config, nothing, nothing, {}, 3).load_model().fingerprint

    free = {"dpo_jax_version": "9", "logging.to": ("csv",), "checkpoint.keep_every": 100, "data.micro_batch": 1}
    assert fingerprint(**free) == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(**{"fingerprints.model": "b"})}) == 3
