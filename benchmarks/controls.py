"""Compares the demo's run with controls, to see whether the preferences make the difference.

  python benchmarks/controls.py --output=runs/controls [--flow]

Runs Diffusion-DPO (the loss as published) of all weights and of a LoRA, plain fine-tuning on the preferred images
(SFT), and Diffusion-DPO with swapped and with shuffled labels, all from the same base, pairs, steps and seeds, and
compares them with the base and with each other. With --flow the base is the tiny flow model, the loss is that of the
demo, and two more seeds take the place of the LoRA. It takes about ten minutes on two CPU cores. Writes
OUTPUT/controls.json, or controls_flow.json; the last results are committed beside this file.
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
FLOW = flags.DEFINE_bool("flow", False, "Tune the tiny flow model and not the tiny SDXL.")

ROOT = Path(__file__).parents[1]
PUBLISHED = "--config.loss.safeguard=none"
"""The loss as published, which the controls are about."""
RUNS = {
    "sft": ["", "--config.loss.name=sft"],
    "dpo": ["", PUBLISHED],
    "lora": [":lora", PUBLISHED],
    "swapped": ["", PUBLISHED, "--config.data.relabel=swapped"],
    "shuffled": ["", PUBLISHED, "--config.data.relabel=shuffled"],
}
"""Each run's variant of the config, and what it changes."""
FLOW_RUNS = {
    "sft": ["", "--config.loss.name=sft"],
    "dpo": [""],
    "swapped": ["", "--config.data.relabel=swapped"],
    "shuffled": ["", "--config.data.relabel=shuffled"],
    "dpo_seed_1": ["", "--config.seed=1"],
    "dpo_seed_2": ["", "--config.seed=2"],
}
"""The runs of the flow model, with the loss of the demo, and with further seeds."""


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    os.chdir(ROOT)  # the config names its folders from there
    if output.exists():
        raise UserError(f"{output} already exists. Choose another --output or remove it")
    config, kind, runs = ("tiny_flow", "flow_", FLOW_RUNS) if FLOW.value else ("tiny", "", RUNS)
    data = output / "data"
    run(
        "dpo_jax.prepare",
        "--source=pickapic",
        f"--input=dpo_jax/tiny/{kind}pairs.parquet",
        f"--output={data}",
        "--validation_fraction=0.1",
    )
    for name, (variant, *arguments) in runs.items():
        run(
            "dpo_jax.train",
            f"--config=configs/{config}.py{variant}",
            *arguments,
            f"--workdir={output / name}",
            f"--config.data.path={data}",
            "--config.sample.every=0",
        )

    models = [f"base=dpo_jax/tiny/{kind}model", *(f"{name}={output / name}" for name in runs)]
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
    (output / f"controls{'_flow' if FLOW.value else ''}.json").write_text(json.dumps(results, indent=2) + "\n")


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    cli.run(main)
