"""Training, as a function."""

from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cli


def train(config: str | ConfigDict, workdir: epath.PathLike, fields: Mapping[str, Any] | None = None) -> None:
    """Train a model on preference pairs, or online in rounds; the same call continues a run that has stopped.

        dpo_jax.train("sdxl:lora", "runs/mine", {"data.path": "data/mine", "optimizer.learning_rate": 1e-5})

    Args:
        config: name or file of a config, each with a variant if wanted ("sdxl:lora"), or a config.
        workdir: folder of the run: a new one, or one to continue.
        fields: values that replace those of the config, by dotted path.

    Raises:
        UserError: a value or a file cannot be used as it is; the message says what to change.
        dpo_jax.training.preemption.Preempted: SIGTERM came. A checkpoint is saved.
    """
    from dpo_jax.training.defaults import with_fields

    config = cli.load_config(config) if isinstance(config, str) else config
    if fields:
        config = with_fields(config, fields)
    if "online" in config:
        from dpo_jax.rounds.config import check as check_online
        from dpo_jax.rounds.loop import learn

        check_online(config)
        learn(config, workdir, "", [])
        return
    from dpo_jax.training.config import check

    check(config)
    from dpo_jax.training import trainer

    trainer.train(settled(config, workdir), workdir)


def settled(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """Return the config in which a plan, which takes seconds, has chosen the fields that depend on the devices.

    A run that goes on keeps what `memory.auto` chose when it began: another precision is another experiment.
    """
    if config.remat != "auto" and config.data.micro_batch and not config.memory.auto:
        return config
    from dpo_jax.planning.search import PRECISION, settle
    from dpo_jax.training.checkpoint import read_config

    if config.memory.auto and (saved := read_config(workdir)):
        config = cli.replaced(config, {name: saved[name] for name in PRECISION if name in saved})
    return settle(config, lambda message: print(message, flush=True))
