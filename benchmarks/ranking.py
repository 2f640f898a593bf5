"""Tests whether judges order models as is known, on the tiny world with three seeds.

  python benchmarks/ranking.py --output=runs/ranking

The three models are the base, Diffusion-DPO on the demo's pairs stopped half way, and in full. They are ordered by the
exact judge, by the implicit reward (of another run's model, so that no model judges its own images), and by five
simulated raters, each wrong a quarter of the time, who vote through the HTTP interface of the page. All images of a
prompt, of all runs, form one cluster of the confidence intervals. It takes about ten minutes on two CPU cores. Writes
OUTPUT/ranking.json; the last result is committed beside this file.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from dpo_jax import cli
from dpo_jax.errors import UserError

OUTPUT = flags.DEFINE_string("output", None, "New folder for the runs and ranking.json.", required=True)
RUNS = flags.DEFINE_integer("runs", 3, "Training runs, each with another seed.", lower_bound=2)
SEEDS = flags.DEFINE_integer("seeds", 12, "Images per held-out prompt and model in a run.")
SHOWN = flags.DEFINE_integer("shown", 36, "Images per prompt and model that the raters see, from all runs together.")

ROOT = Path(__file__).parents[1]
BASE = "dpo_jax/tiny/model"
PROMPTS = "dpo_jax/tiny/heldout.txt"
STEPS, HALF = 60, 30
MODELS = ("base", "half", "full")
# In the demo's first steps both errors of a pair grow with the weights' drift, and the implicit reward sees drift.
GENTLE = (
    "--config.loss.safeguard=none",
    "--config.loss.beta=2000",
    "--config.optimizer.learning_rate=6e-6",
    "--config.optimizer.schedule=constant_with_warmup",
    "--config.ema.decay=0.9",
    "--config.validation.every=0",
)
RATERS, WRONG = 5, 0.25


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    os.chdir(ROOT)  # the config names its folders from there
    if output.exists():
        raise UserError(f"{output} already exists. Choose another --output or remove it")
    run(
        "dpo_jax.prepare",
        "--source=pickapic",
        "--input=dpo_jax/tiny/pairs.parquet",
        f"--output={output / 'data'}",
        "--validation_fraction=0.1",
    )
    for seed in range(RUNS.value):
        train(output, seed)
    for seed in range(RUNS.value):
        evaluate(output, seed)
    results = {
        "exact judge": pooled(output, "shapes"),
        "implicit reward of another run": pooled(output, "implicit"),
        f"{RATERS} raters, each wrong in {WRONG:.0%}": panel(output),
    }
    (output / "ranking.json").write_text(json.dumps(results, indent=2) + "\n")
    for judge, rows in results.items():
        for pair, row in rows.items():
            print(f"{judge}: {pair}: {row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")


def train(output: Path, seed: int) -> None:
    """Run the demo and return the folders of its model, half way and in full."""
    workdir = output / f"run{seed}"
    run(
        "dpo_jax.train",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.path={output / 'data'}",
        f"--config.seed={seed}",
        f"--config.steps={STEPS}",
        f"--config.checkpoint.every={HALF}",
        *GENTLE,
        "--config.sample.every=0",
    )
    # A work directory whose newest checkpoint is the earlier one.
    stopped = output / f"stopped{seed}"
    shutil.copytree(workdir, stopped, ignore=lambda folder, names: [str(STEPS)] if "checkpoints" in folder else [])
    for name, source in (("full", workdir), ("half", stopped)):
        run("dpo_jax.export", f"--workdir={source}", f"--output={output / f'{name}{seed}'}")


def evaluate(output: Path, seed: int) -> None:
    judge = output / f"full{(seed + 1) % RUNS.value}"
    run(
        "dpo_jax.evaluate",
        f"--models=base={BASE},half={output / f'half{seed}'},full={output / f'full{seed}'}",
        f"--prompts={PROMPTS}",
        f"--judges=shapes,implicit={judge}:{BASE}",
        f"--seeds={SEEDS.value}",
        f"--seed={10**6 * (seed + 1)}",
        "--steps=20",
        "--guidance=2.5",
        "--batch_size=58",
        f"--output={output / f'evaluation{seed}'}",
    )


def pooled(output: Path, judge: str) -> dict[str, Any]:
    """Return the win rates over the images of all runs."""
    from dpo_jax.evaluation.compare import compare, match

    prompts: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {name: [] for name in MODELS}
    for seed in range(RUNS.value):
        folder = output / f"evaluation{seed}"
        contest = match({name: folder / "images" / name for name in MODELS})
        prompts.append(contest.prompt_N)
        for name in MODELS:
            scores[name].append(
                np.array(json.loads((folder / "scores" / judge / f"{name}.json").read_text())["scores"])
            )
    contest = contest._replace(prompt_N=np.concatenate(prompts))
    of_all = {name: np.concatenate(found) for name, found in scores.items()}
    rows = compare(contest, {judge: of_all}, {})["judges"][judge]["win_rates"]
    return {f"{row['of']} over {row['over']}": row for row in rows}


def panel(output: Path) -> dict[str, Any]:
    """Return the votes of five raters on some images of all runs, given on the page."""
    from dpo_jax.sampling.image_folder import Entry, read_list, write_list
    from dpo_jax.voting.results import summarise
    from dpo_jax.voting.store import open_votes
    from dpo_jax.voting.study import QUESTIONS

    for name in MODELS:
        entries = []
        (output / "shown" / name).mkdir(parents=True)
        for seed in range(RUNS.value):
            source = output / f"evaluation{seed}" / "images" / name
            for entry in read_list(source):
                if entry.seed % 10**6 < -(-SHOWN.value // RUNS.value):
                    shutil.copy(source / entry.image, output / "shown" / name / entry.image)
                    entries.append(Entry(entry.image, entry.prompt, entry.seed))
        write_list(output / "shown" / name, entries)
    votes = output / "votes.sqlite"
    folders = ",".join(str(output / "shown" / name) for name in MODELS)
    command = ["-m", "dpo_jax.vote", f"--images={folders}", f"--output={votes}", "--port=0", "--ties"]
    server = subprocess.Popen([sys.executable, *command, "--questions=alignment"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = next(found[1] for line in server.stdout if (found := re.match(r"vote: +(http://\S+)/", line)))
        with ThreadPoolExecutor(RATERS) as raters:
            list(raters.map(lambda rater: vote(url, rater), range(RATERS)))
    finally:
        server.terminate()
        server.wait()
    with open_votes(votes) as store:
        summary = summarise(store, {"alignment": QUESTIONS["alignment"]}, lambda tally: sum(tally.values()) >= RATERS)
    (question,) = summary.questions
    print(f"{question.votes} votes; Krippendorff's alpha {question.alpha:.2f}")
    rows = {}
    for comparison in question.comparisons:
        assert comparison.rate is not None
        rows[f"{comparison.of} over {comparison.over}"] = comparison.rate._asdict()
    return rows


def vote(url: str, rater: int) -> None:
    """Vote as one rater, who sees images and prompt and is right in three of four answers."""
    from dpo_jax.rewards import open_judge

    judge, rng = open_judge("shapes"), np.random.default_rng(rater)
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

    def ask(path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
        with browser.open(request, timeout=60) as reply:
            return reply.read()

    ask("/api/start", {"name": f"rater {rater}"})
    state = json.loads(ask("/api/state"))
    while now := state["now"]:
        images = [np.asarray(Image.open(io.BytesIO(ask(f"/image/{image}"))).convert("RGB")) for image in now["images"]]
        scores = judge.score(images, [now["prompt"]] * 2)
        right = int(np.sign(scores[0] - scores[1]))
        wrong = [answer for answer in (-1, 0, 1) if answer != right]
        said = rng.choice(wrong) if rng.random() < WRONG else right
        answer = {1: [1, 0], 0: [0.5, 0.5], -1: [0, 1]}[int(said)]
        state = json.loads(ask("/api/vote", {"task": now["task"], "question": now["question"], "answer": answer}))


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    cli.run(main)
