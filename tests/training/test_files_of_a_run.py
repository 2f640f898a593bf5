"""Damaged logs never stop a run, a damaged config.json is restored, and checkpoints are kept as the config says."""

import errno
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from dpo_jax import files
from dpo_jax.training.checkpoint import Checkpoints, finished_steps, read_config, write_config
from dpo_jax.training.metrics import MetricWriter, last_validation, read_metrics
from dpo_jax.training.run import open_run
from dpo_jax.training.step import TrainState

FIELDS = {"steps": 3, "loss.beta": 5000.0, "sample.prompts": ["a red square"], "model": "tiny"}


def write_rows(workdir: Path, *steps: int) -> Path:
    writer = MetricWriter(workdir, steps[0] - 1, ["tensorboard"])
    for step in steps:
        writer.scalars(step, {"train/loss": 0.5 + step, "validation/pair_accuracy": step / 10})
    writer.close()
    return workdir / "metrics.jsonl"


DAMAGES = {
    "flipped": lambda line: line.replace(b":", b"\x1a", 1),
    "not UTF-8": lambda line: line[:-1] + b"\xff\xfe",
    "NULs": lambda line: bytes(len(line)),
    "torn": lambda line: line[:9],
    "a list": lambda line: b"[1, 2]",
    "a text": lambda line: line.replace(b"2.5", b'"2"'),
    "no step": lambda line: b'{"train/loss": 1.0}',
    "no number": lambda line: b'{"step": null}',
    "infinite": lambda line: b'{"step": Infinity}',
    "digits": lambda line: b'{"step": ' + b"9" * 5000 + b"}",
    "deep": lambda line: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_figures_are_left_out_and_told_by_file_and_line(tmp_path, capsys, damage) -> None:
    file = write_rows(tmp_path, 1, 2, 3)
    lines = file.read_bytes().split(b"\n")
    lines[1] = damage(lines[1])
    damaged = b"\n".join(lines)
    file.write_bytes(damaged)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert capsys.readouterr().err == f"warning: {file}, line 2: damaged, and left out\n"
    assert last_validation(tmp_path)["validation/pair_accuracy"] == 0.3
    writer = MetricWriter(tmp_path, 3)
    writer.scalars(4, {"train/loss": 1.0})
    writer.close()
    capsys.readouterr()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert capsys.readouterr().err == ""
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_line_that_a_kill_left_unfinished_is_no_damage(tmp_path, capsys) -> None:
    file = write_rows(tmp_path, 1, 2)
    file.write_bytes(file.read_bytes()[:-5])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    write_rows(tmp_path, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_folders_in_the_place_of_logs_do_not_stop_a_run(tmp_path, capsys) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("mine")
    write_rows(tmp_path, 1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    told = capsys.readouterr().err.splitlines()
    assert (
        told[0] == f"warning: {tmp_path / 'metrics.jsonl'} is a folder, and a file is needed; its figures are left out"
    )
    assert told[1].startswith('warning: logging to "tensorboard" failed (')
    assert len(told) == 2


def test_a_full_disk_stops_no_log_and_leaves_no_half_line(tmp_path, capsys, monkeypatch) -> None:
    file, append = write_rows(tmp_path, 1), files.append

    def half(path: Path, text: str) -> None:
        append(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricWriter(tmp_path, 1, ["tensorboard"])
    monkeypatch.setattr(files, "append", half)
    monkeypatch.setattr(EventsWriter, "write_event", full)
    for step in range(2, 40):  # more than any queue holds
        writer.scalars(step, {"train/loss": 1.0})
        writer.image(step, "samples", np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(files, "append", append)
    writer.scalars(40, {"train/loss": 2.0})
    writer.close()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in told] == [
        f"warning: cannot write {file}",
        'warning: logging to "tensorboard" failed',
    ]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 40]


def save(workdir: Path, *steps: int, keep: int = 3, keep_every: int = 0, fields: dict | None = None) -> None:
    checkpoints = Checkpoints(workdir, keep=keep, keep_every=keep_every, fields=fields)
    for step in steps:
        state = TrainState(step=jnp.int32(step), params={"a.kernel": jnp.ones(3)}, opt_state=(), ema={})
        checkpoints.save(state, {"position": step})
    checkpoints.close()


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"), [(2, 0, [5, 6]), (0, 0, [1, 2, 3, 4, 5, 6]), (1, 2, [2, 4, 6]), (2, 4, [4, 5, 6])]
)
def test_checkpoints_that_are_kept(tmp_path, keep, keep_every, kept) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, 6, keep=keep, keep_every=keep_every)
    assert finished_steps(tmp_path) == kept
    checkpoints = Checkpoints(tmp_path, keep=keep, keep_every=keep_every)
    assert checkpoints.oldest_to_resume() == {1: 6, 2: 5, 0: 4}[keep]
    checkpoints.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("5000.0", "1000.0"),
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: None,
    ],
    ids=["digit", "truncated", "empty", "NULs", "a list", "absent"],
)
def test_a_damaged_config_is_restored_from_the_newest_checkpoint_that_has_it(tmp_path, capsys, damage) -> None:
    write_config(tmp_path, FIELDS)
    file = tmp_path / "config.json"
    assert read_config(tmp_path) == FIELDS
    save(tmp_path, 1, fields=FIELDS)
    save(tmp_path, 2)  # as older versions did
    damaged = damage(file.read_text())
    file.unlink()
    if damaged is not None:
        file.write_text(damaged)
    assert read_config(tmp_path) == FIELDS
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {file}")
    assert told.endswith(f"; its copy {tmp_path / 'checkpoints/1/config/metadata'} is used instead\n")
    assert told.count("\n") == 1


def test_a_damaged_config_without_a_copy_is_told_by_its_file(tmp_path) -> None:
    write_config(tmp_path, FIELDS)
    save(tmp_path, 2)
    file = tmp_path / "config.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{file} is not valid JSON .*, and no checkpoint .* has a copy"):
        read_config(tmp_path)
    file.write_text(json.dumps(FIELDS))  # as older versions wrote it
    assert read_config(tmp_path) == FIELDS
    file.unlink()
    assert read_config(tmp_path) is None


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_an_older_one_goes(tmp_path, monkeypatch) -> None:
    there, synced = tmp_path / "checkpoints", []

    def sync_tree(folder: Path) -> None:
        items = {path.name for path in folder.iterdir()}
        assert items >= {"state", "position", "checksums", "config"}
        synced.append(sorted(path.name.removesuffix("orbax-checkpoint-tmp") for path in there.iterdir()))

    monkeypatch.setattr(files, "sync_tree", sync_tree)
    save(tmp_path, 1, 2, keep=1, fields=FIELDS)
    assert synced == [["1."], ["1", "2."]]
    assert [path.name for path in there.iterdir()] == ["2"]


def test_fields_of_other_types_are_told_all_at_once(tmp_path) -> None:
    """A file without a checksum, as older versions wrote it."""
    fields = {"steps": "many", "ema.decay": None, "data.random_flip": 1, "sample.prompts": "one", "loss.beta": 5000}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json is damaged \(fingerprints.model: missing; ") as raised:
        open_run(tmp_path)
    assert all(field in str(raised.value) for field in fields.keys() - {"loss.beta"})
    assert "loss.beta" not in str(raised.value)
