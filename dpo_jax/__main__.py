"""`dpo_jax COMMAND` and `python -m dpo_jax COMMAND`: the same as `python -m dpo_jax.COMMAND`."""

import ast
import runpy
import sys
from pathlib import Path

import dpo_jax
from dpo_jax import bundled, command_help, nearest

COMMANDS = ("prepare", "score", "train", "online", "sample", "evaluate", "vote", "export", "plan", "profile")
"""In the order in which a user needs them."""


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--help", "-h", "-help", "help"):
        print(overview())
    elif command in ("--version", "version"):
        print(f"dpo_jax {dpo_jax.__version__}")
    elif command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"dpo_jax.{command}", run_name="__main__", alter_sys=True)
    else:
        hint = nearest.nearest(command, COMMANDS) or f" The commands are {', '.join(COMMANDS)}."
        print(f"error: dpo_jax has no command {command!r}.{hint}", file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    """Return the list of commands with one line for each, the first of its module's docstring."""
    entries = [(name, summary(name)) for name in COMMANDS]
    return (
        f"dpo_jax {dpo_jax.__version__}: align text-to-image diffusion models with human preferences.\n\n"
        "  dpo_jax COMMAND --flag=value ...      or: python -m dpo_jax.COMMAND --flag=value ...\n\n"
        f"Commands:\n{command_help.columns(entries)}\n\n"
        "dpo_jax COMMAND --help shows the flags of a command; dpo_jax --version shows the version.\n"
        f"Configs, for --config=NAME or --config=NAME:variant: {', '.join(bundled.config_names())}."
    )


def summary(command: str) -> str:
    """Return the first line about a command, without importing it."""
    module = ast.parse((Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8"))
    return str(ast.get_docstring(module)).partition("\n")[0]


if __name__ == "__main__":
    main()
