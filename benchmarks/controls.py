"""Is it the preferences that do it? The demo's run beside its controls, from the same base, pairs, steps and seeds.

  python benchmarks/controls.py --output=runs/controls

Runs Diffusion-DPO, plain fine-tuning on the preferred images (SFT), and Diffusion-DPO with swapped and with shuffled
labels; each is compared with the base, and DPO with SFT directly. Some eight minutes on two CPU cores. Writes
OUTPUT/controls.json; the last result is committed beside this file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax import cli

OUTPUT = flags.DEFINE_string("output", None, "New folder for the runs and controls.json.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 20, "Images of each held-out prompt and model.")

ROOT = Path(__file__).parents[1]
RUNS = {
    "dpo": [],
    "sft": ["--config.loss.name=sft"],
    "swapped": ["--config.data.relabel=swapped"],
    "shuffled": ["--config.data.relabel=shuffled"],
}


def main() -> None:
    from dpo_jax.evaluation.compare import compare, judged_samples, read_prompts
    from dpo_jax.rewards import open_judge
    from dpo_jax.training.run import open_run

    output = Path(OUTPUT.value).absolute()
    os.chdir(ROOT)  # the config names its folders from there
    if output.exists():
        raise ValueError(f"{output} already exists; choose another --output or remove it")
    data = output / "data"
    run(
        "dpo_jax.prepare",
        "--source=pickapic",
        "--input=dpo_jax/tiny/pairs.parquet",
        f"--output={data}",
        "--validation_fraction=0.1",
    )
    for name, extra in RUNS.items():
        run(
            "dpo_jax.train",
            "--config=configs/tiny.py",
            f"--workdir={output / name}",
            f"--config.data.path={data}",
            "--config.sample.every=0",
            *extra,
        )

    prompts = read_prompts("dpo_jax/tiny/heldout.txt")
    runs = {name: open_run(output / name) for name in RUNS}
    generator = runs["dpo"].generator(batch_size=32)
    models = {"base": runs["dpo"].base} | {name: run.policy for name, run in runs.items()}
    scores = {
        name: judged_samples(generator, params, prompts, seeds=SEEDS.value, judge=open_judge("shapes"))[1]
        for name, params in models.items()
    }
    results: dict[str, Any] = {}
    for tuned, base in (*((name, "base") for name in RUNS), ("dpo", "sft")):
        figures = compare(scores[tuned], scores[base])
        results[f"{tuned} over {base}"] = figures
        rate, low, high = (figures[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        print(f"{tuned} over {base}: {rate:.3f} [{low:.3f}, {high:.3f}]")
    (output / "controls.json").write_text(json.dumps(results, indent=2) + "\n")


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    cli.run(main)
