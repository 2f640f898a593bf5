"""The --help of a command: what it does, and its flags in the order and sections in which the command declares them."""

import inspect
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType

from absl import flags

_sections: list[tuple[str, int]] = []
"""Titles, each with the number of flags that existed before it."""
_ADDED_BY_ABSL = re.compile(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$")
"""The choices and how to repeat a flag, which are shown in other words."""
INDENT = 25
"""Columns before the text about a flag or a field."""


def section(title: str) -> None:
    """Begin a section of --help: the flags that are declared after this call are listed under the title."""
    _sections.append((title, len(list(flags.FLAGS))))


def help_text(module: ModuleType | None, config_fields: str = "") -> str:
    """Return the --help of the command that a module is.

    Args:
        module: of the command, whose docstring comes first.
        config_fields: text about the fields of the config, after the flags.
    """
    parts = [str(inspect.getdoc(module))]
    for title, names in _titled():
        lines = [line for name in names for line in _entry(name)]
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    general = [
        *_columns("--help", "Show this text."),
        *_columns("--version", "Show the version of dpo_jax."),
        *_entry("traceback"),
    ]
    parts.append("\n".join(["General:", *general]))
    if config_fields:
        parts.append(config_fields)
    return "\n\n".join(parts)


def columns(entries: Iterable[tuple[str, str]]) -> str:
    """Return a text of two columns, names and what is said about them."""
    return "\n".join(line for name, said in entries for line in _columns(name, said))


def _titled() -> Iterator[tuple[str, list[str]]]:
    names = list(flags.FLAGS)
    module = flags.FLAGS.find_module_defining_flag
    main = {name for name in names if module(name) in (sys.argv[0], "__main__") or name == "config"}
    bounds = [*_sections, ("", len(names))]
    first = bounds[0][1]
    if rest := [name for name in names[:first] if name in main]:
        yield "Flags", rest
    for (title, begin), (_, end) in itertools.pairwise(bounds):
        yield title, [name for name in names[begin:end] if name in main]


def _entry(name: str) -> list[str]:
    flag = flags.FLAGS[name]
    if flag.short_name == name or name == "nohelp":
        return []
    parser = flag.parser
    if flag.boolean:
        form = f"--[no]{name}" if flag.default else f"--{name}"
    else:
        kind = {"int": "N", "float": "X"}.get(flag.flag_type(), "...")
        form = f"--{name}={kind}"
    first, *rest = _ADDED_BY_ABSL.sub("", flag.help or "").split("\n")
    extra = []
    if choices := getattr(parser, "enum_values", None):
        shown = [choice for choice in choices if not any(line.startswith(f"{choice}:") for line in rest)]
        if shown:
            extra.append(f"One of {', '.join(map(str, choices))}.")
    if any("other than None" in str(getattr(check, "message", "")) for check in flag.validators):
        extra.append("Required.")
    if not flag.boolean and flag.default not in (None, "", []) and "efault" not in first:
        extra.append(f"Default: {_shown(flag.default)}.")
    lines = _columns(form, " ".join([first, *extra]))
    for line in rest:
        lines += textwrap.wrap(line, _width(), initial_indent=" " * INDENT, subsequent_indent=" " * (INDENT + 2))
    return lines


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _columns(name: str, said: str) -> list[str]:
    lines = textwrap.wrap(said, _width() - INDENT, break_long_words=False) or [""]
    if len(name) > INDENT - 4:
        return [f"  {name}", *(" " * INDENT + line for line in lines)]
    return [f"  {name:{INDENT - 2}}{lines[0]}", *(" " * INDENT + line for line in lines[1:])]


def _width() -> int:
    return min(max(shutil.get_terminal_size((110, 24)).columns, 70), 110)
