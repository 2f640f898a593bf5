"""The command on the bundled pairs, as a user runs it, and training pairs in the order of its scores."""

import functools
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_jax.data.load.records import open_records
from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.scores import candidates, read_scores
from dpo_jax.rewards import JUDGES
from dpo_jax.tiny import judge

from .conftest import ROOT, Command


@pytest.fixture
def score(command: Command) -> Command:
    return functools.partial(command, "score")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    builder.prepare(SOURCES["pickapic"], [ROOT / "dpo_jax" / "tiny" / "pairs.parquet"], folder, workers=0)
    return folder


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))[None]


def test_an_outside_judge_and_the_exact_one(score: Command, data: Path, tmp_path: Path) -> None:
    """Somebody who likes blue scores all images but one; the bundled pairs were voted on by the exact judge itself."""
    prepared = open_prepared(data)
    records = [prepared.record(i) for i in range(len(prepared))]
    blue = [[float(pixels(image)[..., 2].mean()) for image in prepared.read_images(record)] for record in records]
    lines = []
    for i, (record, values) in enumerate(zip(records, blue, strict=True)):
        if i % 2:
            lines.append({"record": i, "scores": values})
        else:
            for image, value in zip(prepared.read_images(record), values, strict=True):
                sha256 = hashlib.sha256(image).hexdigest()
                lines.append({"caption": record["caption"], "sha256": sha256, "score": value})
    del lines[0]
    (tmp_path / "blue.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = score(f"--data={data}", "--judge=blue", f"--scores={tmp_path}/blue.jsonl")
    assert done.returncode == 0, done.stderr
    summary = json.loads((data / "scores" / "blue.json").read_text())
    prefers_first = np.asarray([values[0] > values[1] for values in blue[1:]])
    assert (summary["records"], summary["scored"], summary["ties"]) == (1000, 999, 0)
    assert summary["agreement"]["votes"]["rate"] == pytest.approx(prefers_first.mean())
    assert "records      1000: 999 scored, 1 without scores" in done.stdout

    done = score(f"--data={data}", "--judge=shapes")
    assert done.returncode == 0, done.stderr
    summary = json.loads((data / "scores" / "shapes.json").read_text())
    assert (summary["scored"], summary["ties"], summary["agreement"]["votes"]["rate"]) == (1000, 0, 1.0)
    assert summary["agreement"]["blue"]["rate"] == pytest.approx(prefers_first.mean())
    assert "agrees with  votes: 100.0% [" in done.stdout
    assert done.stdout.splitlines()[-1] == f"written to {data}/scores/shapes.arrow"

    # Both agree on what Pareto leaves; alone, each has its own order.
    by_blue = open_records(data, "train", judges=("blue",))
    by_both = open_records(data, "train", judges=("blue", "shapes"), combine="pareto")
    trained_on = [record["split"] == "train" for record in records[1:]]
    assert len(by_blue) == sum(trained_on)
    assert len(by_both) == (prefers_first & trained_on).sum()
    for pairs in (by_blue, by_both):
        for i in range(0, len(pairs), 20):
            first, second = (pixels(image)[..., 2].mean() for image in pairs.read_images(pairs[i]))
            assert first > second


def test_training_pairs_follow_the_exact_judge(score: Command, data: Path, tmp_path: Path) -> None:
    """Of pairs with every second vote turned round."""
    pairs = pq.read_table(ROOT / "dpo_jax" / "tiny" / "pairs.parquet").slice(0, 60)
    labels = [pairs[f"label_{side}"].to_numpy().copy() for side in (0, 1)]
    labels[0][::2], labels[1][::2] = labels[1][::2].copy(), labels[0][::2].copy()
    for side in (0, 1):
        name = f"label_{side}"
        pairs = pairs.set_column(pairs.schema.get_field_index(name), name, [labels[side]])
    pq.write_table(pairs, tmp_path / "turned.parquet")
    builder.prepare(SOURCES["pickapic"], [tmp_path / "turned.parquet"], tmp_path / "turned", workers=0)
    done = score(f"--data={tmp_path}/turned", "--judge=shapes")
    assert done.returncode == 0, done.stderr
    assert "agrees with  votes: 50.0% [" in done.stdout
    for split in ("train", "validation"):
        judged = open_records(tmp_path / "turned", split, judges=("shapes",))
        for i in range(len(judged)):
            caption, images = judged[i]["caption"], judged.read_images(judged[i])
            first, second = (judge.score(pixels(image), [caption])[0] for image in images)
            assert first > second


def test_a_command_as_the_judge_under_a_name_of_its_own(score: Command, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "blue.py"
    lines = ["import json, sys", "import numpy as np", "from PIL import Image", "for line in sys.stdin:"]
    lines += ["    print(float(np.asarray(Image.open(json.loads(line)['image']))[..., 2].mean()))"]
    script.write_text("\n".join(lines))
    command = f"--judge=command={sys.executable} {script}"
    done = score(f"--data={data}", command, "--name=bluest", "--batch_size=1000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"judge        bluest (dpo_jax.rewards: command={sys.executable} {script})"
    prepared = open_prepared(data)
    table = read_scores(data, ["bluest"], candidates(prepared.records["images"]))[0]
    first = [float(pixels(image)[..., 2].mean()) for image in prepared.read_images(prepared.record(0))]
    np.testing.assert_allclose(table[:2], first, rtol=1e-6)


def test_a_function_of_the_working_directory_as_the_judge(data: Path, tmp_path: Path) -> None:
    lines = ["def blueness(images, captions):", "    return [float(image[..., 2].mean()) for image in images]"]
    (tmp_path / "liking.py").write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}  # python -m adds no folder of its own
    arguments = [f"--data={data}", "--judge=python=liking:blueness", "--name=liking", "--batch_size=1000"]
    command = [sys.executable, "-m", "dpo_jax.score", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    prepared = open_prepared(data)
    table = read_scores(data, ["liking"], candidates(prepared.records["images"]))[0]
    first = [float(pixels(image)[..., 2].mean()) for image in prepared.read_images(prepared.record(0))]
    np.testing.assert_allclose(table[:2], first, rtol=1e-6)


def test_a_command_that_fails_is_not_asked_again(score: Command, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "judge.sh"
    script.write_text(f"#!/bin/sh\necho started >> {tmp_path}/log\necho no GPU here >&2\nexit 3\n")
    script.chmod(0o755)
    done = score(f"--data={data}", f"--judge=command={script}")
    assert (done.returncode, done.stderr) == (1, f"error: the judge {script} ended with 3: no GPU here\n")
    assert (tmp_path / "log").read_text() == "started\n"
    assert not (data / "scores" / "command.arrow").exists()


def test_help_names_the_judges(score: Command) -> None:
    shown = " ".join(score("--help").stdout.split())
    for name, found in JUDGES.items():
        assert f"{name}: {found.help}" in shown


def test_scores_are_not_overwritten_by_mistake(score: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"record": 0, "scores": [2, 2]}')
    file = data / "scores" / "one.arrow"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"earlier")
    arguments = f"--data={data}", "--judge=one", f"--scores={tmp_path}/one.jsonl"
    again = score(*arguments)
    assert again.returncode == 1
    assert again.stderr.startswith(
        f"error: {data} already has scores under the name one; replace them with --overwrite"
    )
    assert file.read_bytes() == b"earlier"
    assert score(*arguments, "--overwrite").returncode == 0
    assert '"ties": 1' in file.with_suffix(".json").read_text()
    assert open_prepared(data, ("one",)).scored_N.tolist() == [True] + [False] * 999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge=beauty"], "--judge=beauty is not a judge of dpo_jax; its judges are shapes, clipscore, pickscore, "),
        (["--judge=hpsv2"], "the judge hpsv2 needs HPS_v2_compressed.pt of xswu/HPSv2 on the hub, converted to "),
        (["--judge=python=a:b"], "python=a:b can't be opened: there is no module a in the working directory or the"),
        (["--judge=shapes", "--name=../x"], "--judge=../x cannot name a file of scores: use letters"),
        (["--judge=../../x"], "--judge=../../x cannot name a file of scores: use letters"),
        (["--judge=votes"], "--judge=votes cannot name a file of scores: use letters"),
        (["--judge=mine", "--scores=nowhere.jsonl"], "no file of scores at nowhere.jsonl; it should have lines of"),
        (["--judge=shapes", "--data=nowhere"], "no prepared data set at nowhere: run python -m dpo_jax.prepare"),
        ([], "flag --judge=None: Flag --judge must have a value"),
    ],
)
def test_mistakes_are_one_sentence(score: Command, data: Path, arguments: list[str], message: str) -> None:
    done = score(f"--data={data}", *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_an_image_that_the_judge_refuses(score: Command, tmp_path: Path) -> None:
    for folder, level in (("w", 0), ("l", 255)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 32), (level,) * 3).save(tmp_path / folder / "0.png")
    (tmp_path / "w" / "0.txt").write_text("a red circle at the top left")
    builder.prepare(SOURCES["pairs_folder"], [tmp_path], tmp_path / "out", workers=0, validation_fraction=0)
    done = score(f"--data={tmp_path}/out", "--judge=shapes")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {open_prepared(tmp_path / 'out').record(0)['where']} cannot be judged: ")
    assert "reads uint8 images [N, 32, 32, 3], not uint8 [1, 32, 40, 3]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "scores").exists()
