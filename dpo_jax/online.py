"""Align a diffusion model online, in rounds: it draws images, a judge or people compare them, and it learns.

  python -m dpo_jax.online --config=configs/d3po.py --workdir=runs/d3po [--config.model=FOLDER_OR_HUB_ID_OR_FILE] \\
      [--config.online.judges="('pickscore',)"] [--config.field=value ...]

The comparison can come from any judge of dpo_jax.evaluate, from several judges, from your own function, or from people.
With people (configs/d3po.py:hands) each round takes two calls and a vote in between:

  python -m dpo_jax.online --config=configs/d3po.py:hands --workdir=DIR --stage=sample
  python -m dpo_jax.vote --images=DIR/rounds/00000/images --mode=points --output=DIR/rounds/00000/votes.sqlite
  python -m dpo_jax.vote --output=DIR/rounds/00000/votes.sqlite --export=DIR/rounds/00000/feedback.json
  python -m dpo_jax.online --config=configs/d3po.py:hands --workdir=DIR --stage=train

The variants of a config are tasks and methods: configs/d3po.py:alignment,ddpo has one task with a judge and one method.
Tasks for people use D3PO. The variant :tiny runs in seconds. The same command continues a run that has stopped, also in
the middle of a round; every round ends with a checkpoint. On SIGTERM the run saves a checkpoint and exits with code 75.

A judge can be exploited: its scores rise while the images get worse. --config.online.watched_judges="('pickscore',)"
names judges that score every round and are never trained on. The run warns when they fall while a trained judge rises,
and ends if they fall further. --step=best of dpo_jax.export, sample and evaluate takes the best round's checkpoint.

The work directory receives config.json, rounds/ (all images and scores), checkpoints/, tensorboard/, metrics.jsonl,
samples/ and result.json, which has the score of the images of each round. These images are drawn before the update of
their round, so result.json does not show the effect of the last one. dpo_jax.export, sample and evaluate take the work
directory like that of any other run.
"""

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import cli, locks
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.rounds.config import check, online_config
from dpo_jax.training.defaults import choose_method, describe


def describe_online(config: ConfigDict | None) -> str:
    return describe(config or online_config())


section("The run")
CONFIG = cli.define_config(
    "Experiment to run, for online learning (d3po, tiny_online):", choose_method, describe_online
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: a new one, or one to continue.", required=True)

section("Rounds that people judge")
STAGE = flags.DEFINE_enum(
    "stage",
    None,
    ["sample", "train"],
    "Stop after sampling a round, or after training on it. Default: run round after round.",
)
FEEDBACK = flags.DEFINE_list(
    "feedback",
    [],
    "With --stage=train: files of scores, [prompt][candidate], which are averaged. Default: feedback*.json in the "
    "folder of the round.",
)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing; name a config made for online learning, for example --config=d3po")
    if "online" not in CONFIG.value:
        raise UserError("this config is for dpo_jax.train. Name one for online learning, for example --config=d3po")
    if FEEDBACK.value and CONFIG.value.online.judges:
        raise UserError(
            "--feedback holds scores by people, and config.online.judges names judges. Leave out one of them"
        )
    if FEEDBACK.value and STAGE.value != "train":
        raise UserError("--feedback belongs to one round, so it needs --stage=train")
    check(CONFIG.value)
    with locks.locked_early(WORKDIR.value, "python -m dpo_jax.online"):
        from dpo_jax.rounds.loop import learn  # after the flags are checked: its imports take seconds
        from dpo_jax.training import command

        command.run(lambda: learn(CONFIG.value, WORKDIR.value, STAGE.value or "", FEEDBACK.value))


if __name__ == "__main__":
    cli.run(main)
