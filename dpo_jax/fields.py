"""The fields of a config, and one sentence about all fields with a wrong value.

Numbers are compared as float32, in which training computes: an `ema.decay` of 0.99999999 is 1 there.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.cli import flatten, unflatten, unknown_field
from dpo_jax.command_help import columns
from dpo_jax.errors import UserError
from dpo_jax.files import is_text

MAX_INT = 2**31 - 1
"""Steps and sizes are int32 on devices."""

SHARE: dict[str, Any] = {"at_least": 0, "at_most": 1}
NOT_ALL: dict[str, Any] = {"at_least": 0, "below": 1}
POSITIVE: dict[str, Any] = {"above": 0}
NOT_NEGATIVE: dict[str, Any] = {"at_least": 0}
COUNT: dict[str, Any] = {"at_least": 1}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config: its default, one line of help, and the accepted values of the default's type."""

    default: Any
    help: str
    at_least: float | None = None
    """Bounds; None means no bound."""
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    may_be_infinite: bool = False
    choices: tuple[str, ...] = ()
    wrong: Callable[[Any], str | None] = lambda value: None
    """Returns any other problem with a value, as the end of a sentence that begins with the value, or None."""

    def __str__(self) -> str:
        """Return the accepted values, for example "at least 1"; empty if the type says everything."""
        if self.choices:
            return f"one of {', '.join(repr(choice) for choice in self.choices)}"
        if (self.at_least, self.at_most) == (0, 1):
            return "a share, from 0 to 1"
        if (self.above, self.below) == (0, 1):
            return "strictly between 0 and 1"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)


def config_of(fields: Mapping[str, Field]) -> ConfigDict:
    """Return a config with the default of every field."""
    return unflatten({path: field.default for path, field in fields.items()})


class FieldHelp(NamedTuple):
    """The text about a field in --help and in the documentation."""

    path: str
    default: Any
    values: str
    """The accepted values, for example "at least 1"; empty if the type of the default says everything."""
    help: str


def fields_help(
    fields: Mapping[str, Field], groups: Mapping[str, str], config: ConfigDict
) -> dict[str, list[FieldHelp]]:
    """Return the help of every field, by the title of its group.

    Args:
        fields: all fields, by their dotted path.
        groups: titles, by the part before the last dot of a path.
        config: config whose values are shown as defaults.
    """
    values = flatten(config)
    described: dict[str, list[FieldHelp]] = {}
    for path, field in fields.items():
        title = groups[path.rpartition(".")[0]]
        described.setdefault(title, []).append(FieldHelp(path, values.get(path), str(field), field.help))
    return described


def fields_text(described: Mapping[str, list[FieldHelp]]) -> str:
    """Return the lines of --help about the fields that `fields_help` describes."""
    parts = ["Fields of the config, each set with --config.FIELD=VALUE:"]
    for title, entries in described.items():
        lines = [(entry.path, " ".join(filter(None, [entry.help, _values(entry)]))) for entry in entries]
        parts.append(f"{title}:\n{columns(lines)}")
    return "\n\n".join(parts)


def _values(entry: FieldHelp) -> str:
    shown = str(entry.default) if isinstance(entry.default, (str, int, float)) else repr(entry.default)
    default = f"default: {shown}" if entry.default != "" else "default: empty"
    values = entry.values.removeprefix("one of ")
    return f"({values}; {default})" if values else f"({default})"


def check_fields(config: ConfigDict, fields: Mapping[str, Field]) -> None:
    """Raise one UserError that names every field, by its dotted path, that does not exist or has a wrong value."""
    given, problems = flatten(config), []
    for path, field in fields.items():
        if path not in given:
            problems.append(f"config.{path} is missing; begin with the config that `default_config` makes")
        elif reason := problem(given[path], field):
            shown = repr(given[path])
            problems.append(f"config.{path}={shown if len(shown) < 100 else f'{shown[:97]}...'} {reason}")
    problems += [unknown_field(path, fields, given) for path in given if path not in fields]
    if problems:
        raise UserError("; ".join(problems))


def problem(value: Any, field: Field) -> str | None:
    """Return the problem with the value of a field, as the end of a sentence; None if there is none."""
    if isinstance(field.default, bool):
        return None if isinstance(value, bool) else "must be True or False"
    if isinstance(field.default, (int, float)):
        return _problem_of_number(value, field, is_whole=isinstance(field.default, int))
    if isinstance(field.default, str):
        if not isinstance(value, str):
            return "must be a text"
        if not is_text(value):
            return "must be text that UTF-8 can hold"
        if field.choices and value not in field.choices:
            return f"must be {field}"
    elif not isinstance(value, (tuple, list)):
        return "must be a tuple, such as ('a', 'b')"
    elif field.wrong not in (are_rules, are_rates) and not all(isinstance(part, str) for part in value):
        return "must be a tuple of texts, such as ('a', 'b')"
    elif field.choices and (unknown := [part for part in value if part not in field.choices]):
        return f"has {unknown[0]!r}, which must be {field}"
    return field.wrong(value)


def _problem_of_number(value: Any, field: Field, *, is_whole: bool) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
        return "must be a whole number" if is_whole else "must be a number"
    if is_whole and field.at_most is None and value > MAX_INT:
        return f"must be at most {MAX_INT}"
    number = value if is_whole else _in_float32(value)
    if not math.isfinite(number) and not (field.may_be_infinite and value == math.inf):
        return "must be a finite number" + (" in float32" if abs(value) < math.inf else "")
    holds = (
        (field.at_least is None or number >= field.at_least)
        and (field.above is None or number > field.above)
        and (field.at_most is None or number <= field.at_most)
        and (field.below is None or number < field.below)
    )
    return field.wrong(value) if holds else f"must be {field}"


def _in_float32(value: float) -> float:
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an integer with hundreds of digits
        return math.inf


def are_devices(value: int) -> str | None:
    """`Field.wrong` for the sizes of the mesh."""
    return "must be 1 or more, or -1 for the devices that are left" if value == 0 else None


def are_patterns(value: str | tuple[str, ...]) -> str | None:
    """`Field.wrong` for regular expressions."""
    for pattern in [value] if isinstance(value, str) else value:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"must be a regular expression ({pattern!r}: {error})"
    return None


def are_rules(value: Any) -> str | None:
    """`Field.wrong` for `mesh.rules`."""
    form = "must be a tuple of rules such as (r'\\.attn1\\.to_q\\.kernel$', (None, 'tensor'))"
    for rule in value:
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2):
            return f"{form}, not {rule!r}"
        pattern, axes = rule
        if not isinstance(pattern, str) or not isinstance(axes, (tuple, list)):
            return f"{form}, not {rule!r}"
        unknown = [axis for axis in axes if axis not in (None, "data", "fsdp", "tensor")]
        if unknown:
            return f"has {unknown[0]!r} for an axis; it must be None, 'data', 'fsdp' or 'tensor'"
        if reason := are_patterns(pattern):
            return reason
    return None


def are_rates(value: Any) -> str | None:
    """`Field.wrong` for `optimizer.rates`."""
    for rate in value:
        is_pair = isinstance(rate, (tuple, list)) and len(rate) == 2 and isinstance(rate[0], str)
        if not is_pair or isinstance(rate[1], bool) or not isinstance(rate[1], (int, float)):
            return f"must be a tuple of pairs such as ((r'\\.norm\\d\\.', 0.1), ('conv_in', 0)), not {rate!r}"
        pattern, factor = rate
        if not math.isfinite(_in_float32(factor)) or factor < 0:
            return (
                f"has the factor {factor!r} for {pattern!r}; it must be a finite number and at least 0, which freezes"
            )
        if reason := are_patterns(pattern):
            return reason
    return None
