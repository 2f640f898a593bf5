"""Parse command lines of dpo_jax without running them, each in a forked process: commands define flags of one name.

It reads a JSON list of [command, argument, ...] and writes a JSON list of what is wrong with each, or "".
"""

import importlib
import json
import os
import sys
import tempfile

from absl import flags

from dpo_jax import cli
from dpo_jax.rounds import config as online_config
from dpo_jax.training import config as train_config


def check_config() -> None:
    """Check the values of the config as far as that needs neither a model nor data."""
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and "online" in config:
        online_config.check(config)
    elif config is not None:
        train_config.check_values(config)
        train_config.check_views(config)


problems = []
for command, *arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if not process:
            sys.stdout = sys.stderr = said
            sys.argv = [command, *arguments]
            importlib.import_module(f"dpo_jax.{command}")
            try:
                cli.run(check_config)
            except SystemExit as ended:
                said.flush()
                os._exit(int(ended.code is not None and ended.code != 0))  # Python's own end takes longest
        _, status = os.waitpid(process, 0)
        said.seek(0)
        problems.append(said.read() or str(status) if status else "")
print(json.dumps(problems))
