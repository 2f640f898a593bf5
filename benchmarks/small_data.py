"""Which settings suit few pairs? The tiny world with 200 and with all pairs, by beta, rate, and LoRA or all weights.

  python benchmarks/small_data.py --output=runs/small_data

Each run makes the same number of steps, from the same base, with the loss as published: the safeguard that is on by
default would hide what a setting does to the winner's error. OUTPUT/small_data.json and small_data.md get, for each,
the accuracy on held-out pairs (at its best and after the last step), by how much the winner's error is above the
reference's then, and the win rate over the base by the exact judge. An hour on two CPU cores. A shorter look:

  python benchmarks/small_data.py --output=runs/small_data --settings="all weights,LoRA" --steps=100 --seeds=4
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.errors import UserError
from dpo_jax.training.metrics import is_validation, read_metrics

OUTPUT = flags.DEFINE_string("output", None, "New folder for the runs and the results.", required=True)
STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", 10)
PAIRS = flags.DEFINE_list("pairs", ["200", "0"], "Pairs to train on; 0 for all 870.")
CHOSEN = flags.DEFINE_list("settings", [], "Names of settings to run. Default: all.")
SEEDS = flags.DEFINE_integer("seeds", 20, "Images per held-out prompt and model; 0 draws none.", 0)

SETTINGS = {
    "all weights": ("", 2000, 5e-5),
    "lower beta": ("", 500, 5e-5),
    "higher rate": ("", 2000, 2e-4),
    "LoRA": (":lora", 2000, 5e-4),
    "LoRA at a lower rate": (":lora", 2000, 1e-4),
}
"""Variant of configs/tiny.py, beta and learning rate; the first is the demo's."""


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    os.chdir(Path(__file__).parents[1])  # the config names its folders from there
    if unknown := sorted(set(CHOSEN.value) - set(SETTINGS)):
        raise UserError(f"--settings: {unknown[0]!r} is not one of {', '.join(SETTINGS)}")
    if output.exists():
        raise UserError(f"{output} already exists. Choose another --output or remove it")
    data = output / "data"
    pairs = "--input=dpo_jax/tiny/pairs.parquet"
    run("dpo_jax.prepare", "--source=pickapic", pairs, f"--output={data}", "--validation_fraction=0.1")
    rows = []
    for limit in map(int, PAIRS.value):
        for name in CHOSEN.value or SETTINGS:
            variant, beta, rate = SETTINGS[name]
            workdir = output / f"run_{len(rows)}"
            run(
                "dpo_jax.train",
                f"--config=configs/tiny.py{variant}",
                f"--workdir={workdir}",
                f"--config.data.path={data}",
                f"--config.data.limit={limit}",
                f"--config.steps={STEPS.value}",
                f"--config.loss.beta={beta}",
                "--config.loss.safeguard=none",
                f"--config.optimizer.learning_rate={rate}",
                f"--config.validation.every={max(STEPS.value // 4, 1)}",
                "--config.sample.every=0",
            )
            rows.append({"pairs": limit or 870, "settings": name, "beta": beta, "rate": rate} | measured(workdir))
    if SEEDS.value:
        for number, row in enumerate(rows):
            row |= judged(output, number)
    (output / "small_data.json").write_text(json.dumps({"steps": STEPS.value, "rows": rows}, indent=1) + "\n")
    (output / "small_data.md").write_text(table(rows))
    print(table(rows))


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def measured(workdir: Path) -> dict[str, float]:
    """Accuracy on held-out pairs, and the rise of the winner's error over the reference's, from the run's curves."""
    rows = [row for row in read_metrics(workdir) if is_validation(row)]
    rows = [row for row in rows if row["step"]]  # a row before the first step is of the base
    best, last = max(rows, key=lambda row: row["validation/pair_accuracy"]), rows[-1]
    rise = last["validation/error_winner"] / last["validation/error_reference_winner"] - 1
    return {
        "best_accuracy": best["validation/pair_accuracy"],
        "best_step": best["step"],
        "last_accuracy": last["validation/pair_accuracy"],
        "winner_error_rise": rise,
    }


def judged(output: Path, number: int) -> dict[str, float]:
    """The win rate of a run over the base. The base's images are drawn once: later evaluations find them."""
    folder = output / "evaluation"
    base, tuned = folder / "images" / "base", output / f"run_{number}"
    for name, model in (("base", "--model=dpo_jax/tiny/model"), (f"run_{number}", f"--workdir={tuned}")):
        run(
            "dpo_jax.sample",
            model,
            "--prompts=dpo_jax/tiny/heldout.txt",
            f"--output={folder / 'images' / name}",
            f"--seeds={SEEDS.value}",
            "--seed=1000000",
            "--steps=20",
            "--guidance=2.5",
            "--batch_size=32",
        )
    run(
        "dpo_jax.evaluate",
        f"--images=base={base},tuned={folder / 'images' / f'run_{number}'}",
        "--judges=shapes",
        f"--output={folder / f'report_{number}'}",
    )
    (judge,) = json.loads((folder / f"report_{number}" / "result.json").read_text())["judges"].values()
    (row,) = judge["win_rates"]
    return {"win_rate": row["rate"], "low": row["low"], "high": row["high"]}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pairs | trained | beta | rate | held-out accuracy: best (step) | last | winner's error | win rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        win = f"{row['win_rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" if "win_rate" in row else ""
        lines.append(
            f"| {row['pairs']} | {row['settings']} | {row['beta']} | {row['rate']:g} | {row['best_accuracy']:.1%} "
            f"({row['best_step']:.0f}) | {row['last_accuracy']:.1%} | {row['winner_error_rise']:+.1%} | {win} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
