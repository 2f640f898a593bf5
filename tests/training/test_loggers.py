"""Loggers beside metrics.jsonl: what each of them receives, on a new run and on a resumed one."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import load_config, replaced
from dpo_jax.rounds.loop import learn
from dpo_jax.training import config as training_config
from dpo_jax.training import loggers
from dpo_jax.training.loggers import RunInfo, check_libraries
from dpo_jax.training.metrics import MetricWriter, read_metrics
from dpo_jax.training.trainer import train

ROOT = Path(__file__).parents[2]

IMAGE = np.zeros((4, 6, 3), np.uint8)


def log_two_runs(workdir: Path, *names: str) -> None:
    """Logs to step 3, is killed, and continues after step 1, with figures of validation besides."""
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        writer = MetricWriter(workdir, start, names, name="first", project="mine", fields={"loss.beta": 5000.0})
        with writer:
            for step in steps:
                writer.scalars(step, {"train/loss": step / 2})
            writer.image(steps[-1], "samples", IMAGE)
            if start:
                writer.scalars(4, {"validation/accuracy": 0.75})


def test_csv_has_the_rows_of_metrics_jsonl(tmp_path) -> None:
    log_two_runs(tmp_path, "csv")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "train/loss", "validation/accuracy"]
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == read_metrics(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "4"]


class Recorder:
    repeats = False
    calls: list[tuple]

    def __init__(self, run: RunInfo):
        self.calls.append(("open", run.name, run.project, dict(run.fields), run.start, run.continues))

    def scalars(self, step, values) -> None:
        self.calls.append((step, *values))

    def image(self, step, name, image_HWC) -> None:
        self.calls.append((step, name, image_HWC.shape))

    def close(self, *, failed) -> None:
        self.calls.append(("close", failed))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    monkeypatch.setitem(loggers.LOGGERS, "recorder", Recorder)
    return Recorder.calls


def test_a_service_gets_name_config_and_grids_and_no_step_twice(tmp_path, calls) -> None:
    log_two_runs(tmp_path, "recorder")
    fields = {"loss.beta": 5000.0}
    assert calls == [
        ("open", "first", "mine", fields, 0, False),
        *[(step, "train/loss") for step in (1, 2, 3)],
        (3, "samples", (4, 6, 3)),
        ("close", False),
        ("open", "first", "mine", fields, 1, True),
        (4, "train/loss"),
        (4, "samples", (4, 6, 3)),
        (4, "validation/accuracy"),
        ("close", False),
    ]


def test_a_service_gets_what_a_kill_kept_from_it(tmp_path, calls) -> None:
    with MetricWriter(tmp_path, 0, ["recorder"]) as writer:
        writer.scalars(2, {"train/loss": 1.0})
        writer.scalars(3, {"train/loss": 1.0})
    with MetricWriter(tmp_path, 2, ["recorder"]) as writer:
        writer.scalars(2, {"validation/accuracy": 1.0})
    assert (2, "validation/accuracy") in calls


def test_the_name_of_a_run_is_that_of_its_work_directory_and_a_failure_is_told(tmp_path, calls) -> None:
    with pytest.raises(RuntimeError), MetricWriter(tmp_path / "mine", 0, ["recorder"]):
        raise RuntimeError
    assert calls[0][1] == "mine"
    assert calls[-1] == ("close", True)


def test_a_service_that_fails_is_told_once_and_stops_no_run(tmp_path, calls, monkeypatch, capsys) -> None:
    def fail(self, step, values) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Recorder, "scalars", fail)
    with MetricWriter(tmp_path, 0, ["recorder", "csv"]) as writer:
        for step in (1, 2):
            writer.scalars(step, {"train/loss": 1.0})
    assert capsys.readouterr().err == (
        'warning: logging to "recorder" failed (no route to host); the run continues without it\n'
    )
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_only_process_0_logs(tmp_path, calls, monkeypatch) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log_two_runs(tmp_path, "recorder", "csv", "tensorboard")
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_config_figures_and_grids(tmp_path) -> None:
    log_two_runs(tmp_path, "tensorboard")
    data = b"".join(file.read_bytes() for file in sorted((tmp_path / "tensorboard").iterdir()))
    for part in (b"loss.beta|5000.0", b"train/loss", b"samples", b"\x89PNG"):
        assert part in data


def test_a_misspelt_logger_is_refused_with_the_choices(tiny_config) -> None:
    with pytest.raises(
        ValueError, match=r"config\.logging\.to=\('wandv',\) has 'wandv', which must be one of 'tensorboard',"
    ):
        training_config.check(tiny_config("tiny", **{"logging.to": ("wandv",)}))
    training_config.check(tiny_config("tiny", **{"logging.to": ()}))


def test_a_missing_library_is_told_with_the_command_that_installs_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(loggers.LIBRARIES, "wandb", "not_installed")
    (tmp_path / "not_installed").mkdir()  # as W&B leaves a folder of its own name
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r'"wandb", and its library is not installed; run pip install not_installed'):
        check_libraries(("csv", "wandb"))


def test_libraries_are_checked_before_anything_loads(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(loggers.LIBRARIES, "wandb", "not_installed")
    for run, name in ((train, "tiny"), (learn, "tiny_online")):
        config = replaced(load_config(f"{ROOT}/configs/{name}.py:tiny"), {"logging.to": ("wandb",)})
        with pytest.raises(ValueError, match="run pip install not_installed"):
            run(config, tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_two_runs(tmp_path, "wandb")
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [run.name.rsplit("-", 1)[1] for run in runs] == [run_id] * 2
    first, second = (next(run.glob("*.wandb")).read_bytes() for run in runs)
    for data in (first, second):
        assert all(part in data for part in (b"loss.beta", b"train/loss", b"first", b"mine"))
    assert b"validation/accuracy" in second
    assert b"validation/accuracy" not in first
    assert all(list(run.glob("files/media/images/samples_*.png")) for run in runs)


def test_trackio_continues_the_same_run(tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec("trackio") is None:  # not imported yet, as it would look for its folder then
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that what is set below is unset at the end
    monkeypatch.delenv("TRACKIO_DIR")
    log_two_runs(tmp_path, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert (tmp_path / "trackio" / "mine.db").exists()
    (run,) = SQLiteStorage.get_runs("mine")
    logged = SQLiteStorage.get_logs("mine", run["name"] if isinstance(run, dict) else run)
    assert [(row["step"], name) for row in logged for name in row if "/" in name or name == "samples"] == [
        *[(step, "train/loss") for step in (1, 2, 3)],
        (3, "samples"),
        (4, "train/loss"),
        (4, "samples"),
        (4, "validation/accuracy"),
    ]
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


START = """
import sys
from pathlib import Path
import dpo_jax.training.trainer
from dpo_jax.training.loggers import RunInfo, TensorBoard
TensorBoard(RunInfo(Path(sys.argv[1]), "run", "project", {}, 0, [], False))
late = ("torch", "transformers", "tensorflow_datasets", "tensorflow", "diffusers", "matplotlib")
print([name for name in late if name in sys.modules])
"""


def test_a_run_starts_without_slow_imports(tmp_path: Path) -> None:
    """PyTorch takes 1.5 s, transformers 1 s; tensorboardX imports PyTorch where it finds it."""
    done = subprocess.run([sys.executable, "-c", START, tmp_path], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
