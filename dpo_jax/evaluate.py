"""Compares a tuned model with its base: a judge scores both models' images of held-out prompts from the same seeds.

  python -m dpo_jax.evaluate --workdir=runs/tiny --prompts=dpo_jax/tiny/heldout.txt --reward=shapes --seeds=20

Prints the win rate (ties count half) with a 95% interval clustered by prompt, and both models' mean scores; writes them
to WORKDIR/result.json and a grid of images to WORKDIR/comparison.png. Sampling is set by the run's config.sample.
"""

import json
import time

from absl import flags
from etils import epath

from dpo_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training run.", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "Text file, one prompt a line.", required=True)
REWARD = flags.DEFINE_string("reward", None, "Judge; NAME or NAME=FOLDER of dpo_jax.rewards.JUDGES.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 20, "Images of each prompt and model.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images sampled at a time.", lower_bound=1)
GRID_ROWS = flags.DEFINE_integer("grid_rows", 8, "Prompts shown in the grid.", lower_bound=1)
SINCE = flags.DEFINE_float("since", None, "Unix time that `seconds` counts from; by default this command's start.")


def main() -> None:
    from dpo_jax.evaluation.compare import compare, judged_samples, read_prompts
    from dpo_jax.evaluation.report import image_grid, save_png
    from dpo_jax.rewards import open_judge
    from dpo_jax.training.metrics import last_validation
    from dpo_jax.training.run import open_run

    since = SINCE.value or time.time()
    prompts = read_prompts(PROMPTS.value)
    judge = open_judge(REWARD.value)
    run = open_run(WORKDIR.value)
    generator = run.generator(BATCH_SIZE.value)
    (base_images, base_scores), (tuned_images, tuned_scores) = (
        judged_samples(generator, params, prompts, seeds=SEEDS.value, judge=judge) for params in (run.base, run.policy)
    )
    result = compare(tuned_scores, base_scores)
    workdir = epath.Path(WORKDIR.value)
    columns = min(SEEDS.value, 4)
    rows = [
        (prompt, [image for pair in zip(base[:columns], tuned[:columns], strict=True) for image in pair])
        for prompt, base, tuned in zip(prompts[: GRID_ROWS.value], base_images, tuned_images, strict=False)
    ]
    save_png(workdir / "comparison.png", image_grid(rows, ["base", "tuned"] * columns))
    result["pair_accuracy"] = last_validation(workdir).get("validation/pair_accuracy")
    result["seconds"] = time.time() - since
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"win rate of tuned over base: {result['win_rate']:.1%}, 95% interval [{result['win_rate_low']:.1%}, "
        f"{result['win_rate_high']:.1%}], on {result['comparisons']} prompt/seed pairs of {len(prompts)} prompts; "
        f"{result['ties']} ties count half"
    )
    print(f"judge's mean score: base {result['base_score']:.1%}, tuned {result['tuned_score']:.1%}")
    if result["pair_accuracy"] is not None:
        print(f"implicit accuracy on held-out pairs: {result['pair_accuracy']:.1%}")
    print(f"seconds: {result['seconds']:.0f}")
    print(f"figures: {workdir / 'result.json'}\nimages:  {workdir / 'comparison.png'}")


if __name__ == "__main__":
    cli.run(main)
