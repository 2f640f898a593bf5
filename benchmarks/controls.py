"""Compares the demo's run with controls, to see whether the preferences make the difference.

  python benchmarks/controls.py --output=runs/controls

Runs Diffusion-DPO (the loss as published) of all weights and of a LoRA, plain fine-tuning on the preferred images
(SFT), and Diffusion-DPO with swapped and with shuffled labels, all from the same base, pairs, steps and seeds, and
compares them with the base and with each other. It takes about ten minutes on two CPU cores. Writes
OUTPUT/controls.json; the last result is committed beside this file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.errors import UserError

OUTPUT = flags.DEFINE_string("output", None, "New folder for the runs and controls.json.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 20, "Images per held-out prompt and model.")

ROOT = Path(__file__).parents[1]
PUBLISHED = "--config.loss.safeguard=none"
"""The loss as published, which the controls are about."""
RUNS = {
    "sft": ["--config=configs/tiny.py", "--config.loss.name=sft"],
    "dpo": ["--config=configs/tiny.py", PUBLISHED],
    "lora": ["--config=configs/tiny.py:lora", PUBLISHED],
    "swapped": ["--config=configs/tiny.py", PUBLISHED, "--config.data.relabel=swapped"],
    "shuffled": ["--config=configs/tiny.py", PUBLISHED, "--config.data.relabel=shuffled"],
}


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    os.chdir(ROOT)  # the config names its folders from there
    if output.exists():
        raise UserError(f"{output} already exists. Choose another --output or remove it")
    data = output / "data"
    run(
        "dpo_jax.prepare",
        "--source=pickapic",
        "--input=dpo_jax/tiny/pairs.parquet",
        f"--output={data}",
        "--validation_fraction=0.1",
    )
    for name, arguments in RUNS.items():
        run(
            "dpo_jax.train",
            *arguments,
            f"--workdir={output / name}",
            f"--config.data.path={data}",
            "--config.sample.every=0",
        )

    models = ["base=dpo_jax/tiny/model", *(f"{name}={output / name}" for name in RUNS)]
    run(
        "dpo_jax.evaluate",
        f"--models={','.join(models)}",
        "--prompts=dpo_jax/tiny/heldout.txt",
        "--judges=shapes",
        f"--seeds={SEEDS.value}",
        "--steps=20",
        "--guidance=2.5",
        "--batch_size=32",
        f"--output={output / 'evaluation'}",
    )
    judged = json.loads((output / "evaluation" / "result.json").read_text())["judges"]["shapes"]
    results = {}
    for row in judged["win_rates"]:
        of, over = row["of"], row["over"]
        results[f"{of} over {over}"] = {
            "win_rate": row["rate"],
            "win_rate_low": row["low"],
            "win_rate_high": row["high"],
            "ties": row["ties"],
            "comparisons": row["comparisons"],
            "base_score": judged["models"][over]["mean"],
            "tuned_score": judged["models"][of]["mean"],
        }
    (output / "controls.json").write_text(json.dumps(results, indent=2) + "\n")


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    cli.run(main)
