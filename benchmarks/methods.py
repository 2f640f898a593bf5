"""Compares methods on the tiny world at equal steps, how plain and stable DPO bear large learning rates, and ways to
store weights and moments.

  python benchmarks/methods.py --table=methods --output=runs/methods       # ten methods, three seeds each
  python benchmarks/methods.py --table=stability --output=runs/stability   # 2 settings x 3 rates x 8 seeds
  python benchmarks/methods.py --table=precision --output=runs/precision --steps=300   # 9 ways to store, three seeds

All runs start from the same base and pairs. For each, the exact judge compares its images of held-out prompts with the
base's, drawn from the same noise. OUTPUT/results.jsonl has a line per finished run; the same command continues with the
runs that are missing. In the end, OUTPUT gets TABLE.json, TABLE.md and TABLE.png. A run takes about 90 seconds on two
CPU cores, so the tables take 50 and 75 minutes. A shorter look:

  python benchmarks/methods.py --table=stability --output=runs/stability --seeds=1 --only=plain --images=4
"""

import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from absl import flags

from dpo_jax import cli
from dpo_jax.training.metrics import is_validation, read_metrics

TABLE = flags.DEFINE_enum("table", None, ["methods", "stability", "precision"], "What to compare.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the runs and results, new or to be continued.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 0, "Runs of each setting; 0 for 3, or 8 for the stability.", 0)
STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", 10)
IMAGES = flags.DEFINE_integer("images", 20, "Images per held-out prompt.", 1)
ONLY = flags.DEFINE_list("only", [], "Settings to run. Default: all.")

RATE = 5e-5
"""The demo's learning rate."""
PLAIN: dict[str, object] = {"loss.safeguard": "none"}
METHODS: dict[str, dict[str, object]] = {
    "stable DPO": {},
    "DPO": PLAIN,
    "auto-beta DPO": PLAIN | {"loss.auto_beta": True},
    "IPO": PLAIN | {"loss.name": "ipo", "loss.beta": 2000},
    "hinge": PLAIN | {"loss.name": "hinge", "loss.beta": 2000},
    "DMPO": PLAIN | {"loss.name": "dmpo", "loss.beta": 2000},
    "Linear-DPO": PLAIN | {"loss.name": "linear_dpo", "loss.beta": 500},
    "MaPO": {"loss.name": "mapo"},
    "KTO": {"loss.name": "kto", "loss.beta": 2000},
    "SFT": {"loss.name": "sft"},
}
"""Ten methods; the losses of pairs without the safeguard that is on by default, but for the first."""
STABILITY: dict[str, dict[str, object]] = {
    "plain": PLAIN,
    "stable": {},
}
BFLOAT16: dict[str, object] = {"memory.masters": "bfloat16"}
INT8: dict[str, object] = {"optimizer.moments": "int8"}
LORA: dict[str, object] = {"lora.rank": 8, "optimizer.learning_rate": 5e-4}
PRECISION: dict[str, dict[str, object]] = {
    "float32": {},
    "bfloat16 weights, 8-bit moments": BFLOAT16 | INT8,
    "LoRA": LORA,
    "LoRA, nf4 base": LORA | {"memory.frozen": "nf4"},
    "LoRA, int8 base": LORA | {"memory.frozen": "int8"},
    "bfloat16 weights": BFLOAT16,
    "8-bit moments": INT8,
    "bfloat16 moments": {"optimizer.moments": "bfloat16"},
    "bfloat16 weights, Adafactor": BFLOAT16 | {"optimizer.name": "adafactor"},
}
"""Whole denoisers, and LoRAs at ten times the rate."""
FACTORS = {"methods": (1,), "stability": (1, 3, 10), "precision": (1,)}


class Run(NamedTuple):
    setting: str
    factor: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.replace(' ', '_')}_x{self.factor}_{self.seed}"


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    os.chdir(Path(__file__).parents[1])  # the config names its folders from there
    settings = {"methods": METHODS, "stability": STABILITY, "precision": PRECISION}[TABLE.value]
    seeds = range(SEEDS.value or {"methods": 3, "stability": 8, "precision": 3}[TABLE.value])
    chosen = {name: fields for name, fields in settings.items() if not ONLY.value or name in ONLY.value}
    runs = [Run(name, factor, seed) for seed in seeds for factor in FACTORS[TABLE.value] for name in chosen]
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "compiled"))
    if not (output / "data").exists():
        pairs = "--input=dpo_jax/tiny/pairs.parquet"
        command("prepare", "--source=pickapic", pairs, f"--output={output / 'data'}", "--validation_fraction=0.1")
    draw("--model=dpo_jax/tiny/model", output / "base")
    results = read(output)
    for run in runs:
        if run.name not in results:
            results[run.name] = measure(run, chosen[run.setting], output)
            with (output / "results.jsonl").open("a") as file:
                file.write(json.dumps({"name": run.name} | results[run.name]) + "\n")
    rows = summary([(run, results[run.name]) for run in runs])
    (output / f"{TABLE.value}.json").write_text(json.dumps({"steps": STEPS.value, "rows": rows}, indent=1) + "\n")
    (output / f"{TABLE.value}.md").write_text(as_table(rows))
    plot(rows, output / f"{TABLE.value}.png")
    print(as_table(rows))


def read(output: Path) -> dict[str, dict[str, float]]:
    """Return what finished runs have measured, by their names."""
    file = output / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row.pop("name"): row for row in map(json.loads, lines)}


def measure(run: Run, fields: dict[str, object], output: Path) -> dict[str, float]:
    """Train, draw, judge, and return the figures of one run; a run that stops before its end counts as lost."""
    workdir, began = output / run.name, time.monotonic()
    values = {
        "data.path": str(output / "data"),
        "steps": STEPS.value,
        "seed": run.seed,
        "optimizer.learning_rate": RATE * run.factor,
        "validation.every": STEPS.value,
        "sample.every": 0,
        "checkpoint.every": STEPS.value,
    } | fields
    shutil.rmtree(workdir, ignore_errors=True)  # of a run that was interrupted
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    try:
        command("train", "--config=configs/tiny.py", f"--workdir={workdir}", *arguments)
    except subprocess.CalledProcessError:
        if list(workdir.glob("errors/*.txt")):  # a traceback: a fault of the code, and not of the settings
            raise
        return {"lost": 1}
    seconds = time.monotonic() - began
    draw(f"--workdir={workdir}", workdir / "images")
    report = workdir / "report"
    images = f"--images=base={output / 'base'},tuned={workdir / 'images'}"
    command("evaluate", images, "--judges=shapes", f"--output={report}")
    result = json.loads((report / "result.json").read_text())
    (judge,) = result["judges"].values()
    (row,) = judge["win_rates"]
    found = {"win_rate": row["rate"], "low": row["low"], "high": row["high"], "seconds": seconds}
    found |= {"base_score": judge["models"]["base"]["mean"], "score": judge["models"]["tuned"]["mean"]}
    base, tuned = result["models"]["base"], result["models"]["tuned"]
    found |= {"diversity": tuned["diversity"] / base["diversity"], "drift": tuned["distance_to_first"]}
    validations = [line for line in read_metrics(workdir) if is_validation(line)]
    first, last = validations[0], validations[-1]
    winner = "validation/error_winner"
    if winner in last:  # a method of single images does not tell it, nor SFT an accuracy
        found["winner_error_rise"] = last[winner] / first[winner] - 1
    for name in {"validation/pair_accuracy", "validation/vote_accuracy"}.intersection(last):
        found["accuracy"] = last[name]
    shutil.rmtree(workdir / "checkpoints")
    return found


def draw(model: str, folder: Path) -> None:
    """Draw the held-out prompts, from the same noise for every model."""
    prompts = ("--prompts=dpo_jax/tiny/heldout.txt", f"--seeds={IMAGES.value}", "--seed=1000000")
    how = ("--steps=20", "--guidance=2.5", "--batch_size=32")
    command("sample", model, f"--output={folder}", *prompts, *how)


def command(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"dpo_jax.{name}", *arguments], check=True)


def summary(results: list[tuple[Run, dict[str, float]]]) -> list[dict[str, object]]:
    """Return one row per setting and rate."""
    groups = collections.defaultdict(list)
    for run, found in results:
        groups[run.setting, run.factor].append(found)
    rows: list[dict[str, object]] = []
    for (setting, factor), found in groups.items():
        whole = [each for each in found if "lost" not in each]
        lost = len(found) - len(whole) + sum(each["score"] < each["base_score"] for each in whole)
        row: dict[str, object] = {"setting": setting, "rate": RATE * factor, "runs": len(found), "below_base": lost}
        row["win_rates"] = [each["win_rate"] for each in whole]
        names = ("win_rate", "low", "high", "accuracy", "winner_error_rise", "diversity", "drift", "seconds")
        row |= {name: statistics.median(each[name] for each in whole) for name in names if whole and name in whole[0]}
        rows.append(row)
    return rows


def plot(rows: list[dict], file: Path) -> None:
    """Draw the win rate of each run as a dot, and the medians as lines, one row per setting and rate."""
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        below = [rate < 0.5 for rate in row["win_rates"]]
        colors = ["#cc3311" if worse else "#4477aa" for worse in below]
        axes.scatter(row["win_rates"], [y] * len(below), c=colors, s=18, alpha=0.7)
        if row["win_rates"]:
            axes.plot([row["win_rate"]] * 2, [y - 0.35, y + 0.35], color="black")
    axes.axvline(0.5, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['setting']}, {row['rate']:g}" for row in reversed(rows)])
    axes.set_xlabel("win rate over the base (a dot per run, a line at the median)")
    figure.savefig(file, dpi=120)


def as_table(rows: list[dict]) -> str:
    """The rows as a Markdown table; medians over the seeds."""
    lines = [
        "| setting | rate | runs | below base | win rate | accuracy | winner's error | drift | diversity | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [""] * 6
        if "win_rate" in row:
            figures = [
                f"{row['win_rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
                f"{row['accuracy']:.1%}" if "accuracy" in row else "",
                f"{row['winner_error_rise']:+.1%}" if "winner_error_rise" in row else "",
                f"{row['drift']:.3g}",
                f"{row['diversity']:.1%}",
                f"{row['seconds']:.0f}",
            ]
        cells = [row["setting"], f"{row['rate']:g}", str(row["runs"]), str(row["below_base"]), *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
