"""Fine-tune a latent diffusion model on preference pairs.

  python -m dpo_jax.train --config=configs/sdxl.py --workdir=runs/sdxl \\
      --config.model=FOLDER_OR_HUB_ID_OR_FILE --config.data.path=PREPARED_FOLDER [--config.field=value ...]

--config=NAME:tiny runs the same experiment with a small random model and random pairs, in seconds. The same command
continues a run that has stopped. On SIGTERM the run saves a checkpoint and exits with code 75, which means: run it
again. The work directory receives config.json, checkpoints/, tensorboard/, metrics.jsonl and samples/.
"""

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.api import training
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.training.config import check
from dpo_jax.training.defaults import choose_method, describe

section("The run")
CONFIG = cli.define_config("Experiment to run:", choose_method, describe)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: a new one, or one to continue.", required=True)

section("After a step that was not finite")
REPLAY = flags.DEFINE_string(
    "replay",
    None,
    "Do not train: replay a batch that the run kept in WORKDIR/errors when a step was not finite. Prints the loss, "
    "errors and log-ratios of the examples that are not finite, with the newest checkpoint, in the dtype of the config "
    "and in float32.",
)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing; name a config or a file, for example --config=tiny")
    check(CONFIG.value)
    with locks.locked_early(WORKDIR.value, "python -m dpo_jax.train"):
        from dpo_jax.training import command  # after the flags are checked: its imports take seconds

        if REPLAY.value:
            from dpo_jax.training.replay import replay

            command.run(lambda: replay(training.settled(CONFIG.value, WORKDIR.value), WORKDIR.value, REPLAY.value))
            return
        command.run(lambda: training.train(CONFIG.value, WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
