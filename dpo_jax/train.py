"""Fine-tunes a latent diffusion model on preference pairs.

  python -m dpo_jax.train --config=configs/sdxl.py --workdir=runs/sdxl \\
      --config.model=FOLDER_OR_HUB_ID_OR_FILE --config.data.path=PREPARED_FOLDER [--config.field=value ...]

FILE:tiny runs the same experiment with a small random model and made pairs, in seconds. Run the same command again to
continue where a run stopped, whatever stopped it. On SIGTERM it saves and exits with code 75: "run it again". The work
directory receives config.json, checkpoints/, tensorboard/, metrics.jsonl and samples/. The fields and their meaning are
in dpo_jax/training/config.py.
"""

import functools

from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import cli, locks
from dpo_jax.errors import UserError
from dpo_jax.training.config import check

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, or FILE:variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that receives, or already holds, the run.", required=True)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing; give one of the files in configs/, such as --config=configs/tiny.py")
    check(CONFIG.value)
    with locks.locked_early(WORKDIR.value, "python -m dpo_jax.train"):
        from dpo_jax.training import command  # after the flags are checked: importing JAX takes seconds
        from dpo_jax.training.trainer import train

        command.run(lambda: train(settled(CONFIG.value), WORKDIR.value))


def settled(config: ConfigDict) -> ConfigDict:
    """The config with what it leaves to the devices chosen; a plan, which takes seconds, is made only for that."""
    if config.remat != "auto" and config.data.micro_batch:
        return config
    from dpo_jax.planning.search import settle

    return settle(config, functools.partial(print, flush=True))


if __name__ == "__main__":
    cli.run(main)
