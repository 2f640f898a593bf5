"""A run leaves out a damaged image of its data set, reports and counts it, continues, and resumes."""

import json
import shutil
from pathlib import Path

import pytest

from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.streams import warn
from dpo_jax.training.trainer import train


def damage_an_image_of_one_training_record(data: Path) -> int:
    """Return the damaged record."""
    prepared = open_prepared(data)
    records = prepared.records.to_pylist()
    used = [image for record in records for image in record["images"]]
    number, image = next(
        (number, image)
        for number, record in enumerate(records)
        for image in record["images"]
        if record["split"] == "train" and used.count(image) == 1
    )
    content = prepared.images[image].tobytes()
    file = next(file for file, positions in prepared.images.positions() if image in positions)
    file.write_bytes(file.read_bytes().replace(content, content[:-20] + bytes(20)))
    return number


def final_state(workdir: Path) -> dict[str, object]:
    """Return the checksums of the last checkpoint."""
    return json.loads((workdir / "checkpoints" / "4" / "checksums" / "metadata").read_text())


def test_a_run_leaves_it_out_counts_it_and_resumes(
    tiny_config, no_network: None, mixed_pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = damage_an_image_of_one_training_record(mixed_pairs)
    fields = {"data.path": str(mixed_pairs), "checkpoint.every": 2, "log_every": 1, "steps": 4}
    train(tiny_config("sd15", **fields), tmp_path / "run")
    said = capfd.readouterr().err
    assert said.count(f"warning: record {record} of {mixed_pairs} (") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["data/damaged_records"] == 1  # four steps of four samples are more than an epoch
    expected = final_state(tmp_path / "run")

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    warn.cache_clear()
    train(tiny_config("sd15", **fields), tmp_path / "resumed")
    assert final_state(tmp_path / "resumed") == expected
