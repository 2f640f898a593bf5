"""Aligns a diffusion model online: it samples images, a judge or people compare them, and it learns; round by round.

  python -m dpo_jax.online --config=configs/d3po.py --workdir=runs/d3po [--config.model=FOLDER_OR_HUB_ID_OR_FILE] \\
      [--config.online.judges="('pickscore',)"] [--config.field=value ...]

No reward is needed but an order: any judge of dpo_jax.evaluate, several at once, your own function, or people. With
people (configs/d3po.py:hands) each round takes two calls and a vote in between:

  python -m dpo_jax.online --config=configs/d3po.py:hands --workdir=DIR --stage=sample
  python -m dpo_jax.vote --images=DIR/rounds/00000/images --mode=points --output=DIR/rounds/00000/votes.sqlite
  python -m dpo_jax.vote --output=DIR/rounds/00000/votes.sqlite --export=DIR/rounds/00000/feedback.json
  python -m dpo_jax.online --config=configs/d3po.py:hands --workdir=DIR --stage=train

The config's variants are tasks and methods: configs/d3po.py:alignment,ddpo has one with a judge and a method; tasks for
people are D3PO's. :tiny runs each in seconds. Run the same command again to continue where a run stopped, also in the
middle of a round, each of which ends with a checkpoint; on SIGTERM it saves and exits with code 75. The work directory
receives config.json, rounds/ (images and scores, which stay), checkpoints/, tensorboard/, metrics.jsonl, samples/ and
result.json: the score of each round's images, so none of what the last round has taught. python -m dpo_jax.export,
sample and evaluate take it as they take any run.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax import cli, locks
from dpo_jax.errors import UserError
from dpo_jax.rounds.config import check

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, or FILE:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that receives, or already holds, the run.", required=True)
STAGE = flags.DEFINE_enum(
    "stage",
    None,
    ["sample", "train"],
    "End when the round is sampled, or when it is trained on; by default round follows round.",
)
FEEDBACK = flags.DEFINE_list(
    "feedback",
    [],
    "Files of scores by people, [prompt][candidate], of the round that is trained on next; averaged. By default "
    "feedback*.json in its folder.",
)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing; give one made for online learning, such as --config=configs/d3po.py")
    if "online" not in CONFIG.value:
        raise UserError("this config is for dpo_jax.train; give one made for online learning, such as configs/d3po.py")
    if FEEDBACK.value and CONFIG.value.online.judges:
        raise UserError("--feedback is people's, and config.online.judges names judges; leave out either")
    if FEEDBACK.value and STAGE.value != "train":
        raise UserError("--feedback is of one round; give it with --stage=train")
    check(CONFIG.value)
    with locks.locked_early(WORKDIR.value, "python -m dpo_jax.online"):
        from dpo_jax.rounds.loop import learn  # after the flags are checked: importing JAX takes seconds
        from dpo_jax.training import command

        command.run(lambda: learn(CONFIG.value, WORKDIR.value, STAGE.value or "", FEEDBACK.value))


if __name__ == "__main__":
    cli.run(main)
