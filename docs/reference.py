"""Make the pages of the reference from the code: every command with its flags, and every field of a config.

Sphinx calls `write_pages` when it builds the documentation (`conf.py`). Each command defines flags of the same names,
so the modules are imported one after the other, and the flags of each are taken away again. For that they must not have
been imported before: use a new process.
"""

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

COMMANDS = ("prepare", "train", "export", "sample", "evaluate", "vote", "score", "online", "plan", "profile")


QUOTE = "'"


def write_pages(folder: Path) -> None:
    """Write commands.md and fields.md into the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "fields.md").write_text(fields_page())
    (folder / "commands.md").write_text(commands_page())


def fields_page() -> str:
    """Return a page with a table for each group of fields, and one for each method."""
    from dpo_jax.methods.kto import VOTE_FIELDS
    from dpo_jax.methods.plackett_luce import LIST_FIELDS
    from dpo_jax.methods.rollouts import ROLLOUT_FIELDS
    from dpo_jax.methods.stability import PAIR_FIELDS
    from dpo_jax.training.defaults import FIELDS

    return (
        "# Fields of a config\n\n"
        "Set a field in a config file, or on the command line: `--config.loss.beta=2000`. Tuples are written as in\n"
        "Python: `--config.data.judges=\"('pickscore',)\"`. This page is made from the code.\n\n"
        "## All configs\n\n" + "\n".join(field_tables(FIELDS)) + "\n## Fields of a method\n\n"
        "`loss.name` chooses the method, which adds fields of its own, with these defaults.\n\n"
        + "\n".join(method_tables())
        + "\nMethods that compare the log-ratios of pairs have these, too:\n\n"
        + "\n".join(field_tables({f"loss.{name}": field for name, field in PAIR_FIELDS.items()}))
        + "\nMethods that learn from votes on single images have this one, too:\n\n"
        + "\n".join(field_tables(VOTE_FIELDS))
        + "\nMethods that learn from lists of ranked images have this one, too:\n\n"
        + "\n".join(field_tables(LIST_FIELDS))
        + "\n## dpo_jax online\n\n"
        "Methods that learn from images which the model draws have these fields, too. Of the `data` fields they read\n"
        "`batch_size`, `micro_batch` and `resolution`, and of the `validation` fields none.\n\n"
        + "\n".join(field_tables(ROLLOUT_FIELDS))
    )


def method_tables() -> Iterator[str]:
    """Yield a paragraph and a table for each method."""
    from dpo_jax.methods import METHODS

    for name, method in METHODS.items():
        sets = ", ".join(f"`{path}={value!r}`" for path, value in method.sets.items())
        yield f"**`{name}`**: {method.citation}, learns from {method.learns_from}." + (f" Sets {sets}." if sets else "")
        rows = [
            f"| `loss.{path}` | `{field.default!r}` | {cell(field.help)}{values(field)} |\n"
            for path, field in method.fields.items()
        ]
        yield "\n| field | default | meaning |\n|---|---|---|\n" + "".join(rows) if rows else ""


def field_tables(fields: Mapping) -> Iterator[str]:
    """Yield a table for each group."""
    from dpo_jax.training.defaults import GROUPS

    for group, title in GROUPS.items():
        rows = [(path, field) for path, field in fields.items() if path.rpartition(".")[0] == group]
        if rows:
            yield f"**{title}**\n\n| field | default | meaning |\n|---|---|---|\n" + "".join(
                f"| `{path}` | `{field.default!r}` | {cell(field.help)}{values(field)} |\n" for path, field in rows
            )


def values(field) -> str:
    """The values that the field takes, as a further sentence."""
    return f" Values: {cell(str(field))}." if str(field) else ""


def commands_page() -> str:
    """Return a page with the help and the flags of every command."""
    parts = [
        "# Commands\n\n"
        "`dpo_jax COMMAND` and `python -m dpo_jax.COMMAND` do the same. Every command takes `--help`,\n"
        "and `--traceback`, which shows the traceback of an error instead of one sentence. This page is made from the\n"
        "code.\n"
    ]
    for name in COMMANDS:
        about, defined = describe(name)
        rows = [
            f"| `--{flag}` | {help_of(defined[flag])} | {default_of(defined[flag])} |"
            for flag in sorted(defined, key=lambda flag: (not required(defined[flag]), list(defined).index(flag)))
        ]
        table = "\n".join(["| flag | meaning | default |", "|---|---|---|", *rows])
        parts.append(f"## {name}\n\n{as_markdown(about)}\n\n{table}\n")
    return "\n".join(parts)


def describe(name: str) -> tuple[str, dict[str, flags.Flag]]:
    """Import a command; return its docstring and its flags, which are no longer in `flags.FLAGS` then."""
    others = set(flags.FLAGS)
    module = importlib.import_module(f"dpo_jax.{name}")
    defined = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)}
    for flag in set(flags.FLAGS) - others:
        delattr(flags.FLAGS, flag)
    return inspect.getdoc(module) or "", defined


def required(flag: flags.Flag) -> bool:
    """Whether the command does not run without the flag."""
    return any("must have a value" in validator.message for validator in flag.validators)


def default_of(flag: flags.Flag) -> str:
    if required(flag):
        return "required"
    if flag.default in (None, "", []):
        return ""
    value = flag.default_as_str
    return f"`{value[1:-1] if value[:1] == value[-1:] == QUOTE else value}`"


def help_of(flag: flags.Flag) -> str:
    """The help with the choices, each of those that have help of their own on a line."""
    first, *lines = re.sub(r"^<[^>]*>: ", "", flag.help or "").splitlines()
    choices = getattr(flag.parser, "enum_values", None)
    if choices and not lines:
        first += f" One of {', '.join(choices)}."
    named = [line.strip().partition(": ") for line in lines]
    return "<br>".join([cell(first), *(f"`{name}`: {cell(text)}" if text else cell(name) for name, _, text in named)])


def as_markdown(docstring: str) -> str:
    """The docstring with its indented lines, which are commands or lists, as code."""

    def fenced(block: str) -> str:
        return f"\n```text\n{textwrap.dedent(block).strip()}\n```\n"

    parts = re.split(r"((?:^  .*\n?(?:\n(?=  ))?)+)", docstring, flags=re.MULTILINE)
    return "".join(escape(part) if i % 2 == 0 else fenced(part) for i, part in enumerate(parts))


def cell(text: str) -> str:
    return escape(text).replace("|", "\\|")


def escape(text: str) -> str:
    """Text in which Markdown finds no HTML, links or emphasis."""
    return "".join(f"\\{character}" if character in "<>[]*_`$" else character for character in text)
