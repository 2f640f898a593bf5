"""Parse command lines of dpo_jax without running them, each in a forked process: commands define flags of one name.

It reads a JSON list of [command, argument, ...] and writes a JSON list of what is wrong with each, or "".
"""

import contextlib
import importlib
import json
import os
import sys

from absl import flags

from dpo_jax import cli
from dpo_jax.rounds import config as online_config
from dpo_jax.training import config as train_config


def parse(command: str, arguments: list[str]) -> None:
    """Raises what the command would, up to the point where it reads files."""
    importlib.import_module(f"dpo_jax.{command}")
    sys.argv = [command, *arguments]
    cli._check_overrides(arguments)
    rest = flags.FLAGS(sys.argv)
    if rest[1:]:
        raise ValueError(f"unexpected argument {rest[1]!r}")
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and "online" in config:
        online_config.check(config)
    elif config is not None:
        train_config.check_values(config)
        train_config.check_views(config)


problems = []
for command, *arguments in json.load(sys.stdin):
    reader, writer = os.pipe()
    if not os.fork():
        os.close(reader)
        with open(writer, "w") as pipe, contextlib.redirect_stdout(sys.stderr):
            try:
                parse(command, arguments)
            except Exception as error:
                pipe.write(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        problems.append(pipe.read())
    os.wait()
print(json.dumps(problems))
