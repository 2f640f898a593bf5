"""What the processes of a run do once for all: ask outside judges, and look for what people said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JUDGE = """
import pathlib, time, jax

def score(images, captions):
    calls = pathlib.Path(__file__).with_name("calls.txt")
    with calls.open("a") as file:
        file.write(f"{jax.process_index()} {len(images)}\\n")
    time.sleep(SECONDS)
    return [float(image.mean()) + jax.process_index() for image in images]
"""
SCRIPT = """
import json, sys
from dpo_jax import cluster
from dpo_jax.cli import load_config, replaced
workdir, fields, stages = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
cluster.join()
from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.rounds.loop import learn
if not cluster.is_first():  # as if its file system were slow to tell
    RoundFolder.feedback = RoundFolder.missing = lambda self: []
    RoundFolder.read_scores = lambda self, shape_KR: None
    RoundFolder.is_scored = lambda self: False
config = load_config("configs/d3po.py:tiny")
config.online.rounds, config.data.batch_size, config.sample.every = 1, 2, 0
config.online.prompts_per_round, config.online.candidates = 4, 2
config = replaced(config, {**fields, "online.judges": tuple(fields["online.judges"])})
for stage in stages:
    learn(config, workdir, stage)
    if stage == "sample" and cluster.is_first():
        with open(f"{workdir}/rounds/00000/feedback.json", "w") as file:
            json.dump([[p, 1.1] for p in range(4)], file)
    cluster.wait("people have voted")
"""


def learned(workdir: Path, fields: dict, stages: list[str], **environment: str) -> dict:
    """`scores.json` of the round, of a run by two processes."""
    script = ["bash", "launch/local_cluster.sh", sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        [*script, str(workdir), json.dumps(fields), json.dumps(stages)],
        cwd=ROOT,
        env=os.environ | {"PROCESSES": "2", "DEVICES": "1", "JAX_NUM_CPU_DEVICES": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (workdir / "checkpoints" / "2").exists()
    return json.loads((workdir / "rounds/00000/scores.json").read_text())["scores"]


@pytest.mark.slow
def test_an_outside_judge_is_asked_by_the_first_process_alone(tmp_path):
    """However long it takes."""
    (tmp_path / "counted_judge.py").write_text(JUDGE.replace("SECONDS", "40"))
    fields = {"online.judges": ["python=counted_judge:score", "jpeg_compressibility"]}
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"

    scores = learned(tmp_path / "run", fields, [""], PYTHONPATH=path)

    assert (tmp_path / "calls.txt").read_text().splitlines() == ["0 4", "0 4"]
    assert all(mean > 0 > kilobytes for of_prompt in scores for mean, kilobytes in of_prompt)


@pytest.mark.slow
def test_the_first_process_says_what_people_said(tmp_path):
    scores = learned(tmp_path / "run", {"online.judges": []}, ["sample", "train"])
    assert scores == [[[p], [1.1]] for p in range(4)]
