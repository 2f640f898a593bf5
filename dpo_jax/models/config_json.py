"""Reads a checkpoint's config.json into a frozen dataclass and refuses settings that would be computed differently."""

import dataclasses
import functools
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

import pydantic

from dpo_jax.errors import UserError
from dpo_jax.files import conform

Config = TypeVar("Config")

MAX_BYTES = 2**24
"""Largest size of a config.json in bytes; real ones have a few kB."""
Width = Annotated[int, pydantic.Field(ge=1, le=2**16)]
"""Number of channels, features, heads or positions. A larger number is damage, and building its network never ends."""
Depth = Annotated[int, pydantic.Field(ge=1, le=256)]
"""Number of layers in a row."""
Vocabulary = Annotated[int, pydantic.Field(ge=1, le=2**24)]
TokenId = Annotated[int, pydantic.Field(ge=0, le=2**24)]
Positive = Annotated[float, pydantic.Field(gt=0, lt=1e9)]
Finite = Annotated[float, pydantic.Field(gt=-1e9, lt=1e9)]


def read_config(
    cls: type[Config],
    config: Mapping[str, Any],
    where: str,
    *,
    supported: Mapping[str, Collection[Any]],
    metadata: Collection[str] = (),
) -> Config:
    """Build the dataclass `cls`, whose defaults are those of the original library.

    A field of `cls` must have its type, and a field in `supported` must have a value listed there. Every other field
    must be listed in `metadata` or begin with an underscore: these change no output. Raises one UserError that names
    `where` and all fields that are wrong.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    problems = []
    try:
        checked: pydantic.BaseModel = conform(values, _schema(cls), where)  # type: ignore[arg-type]
        values = {name: getattr(checked, name) for name in values}
    except ValueError as error:
        problems.append(str(error).removeprefix(f"{where}: ").replace("a valid tuple", "a list"))
    for name, value in config.items():
        if name in supported and value not in supported[name]:
            choices = " or ".join(map(repr, supported[name]))
            problems.append(f"{name} = {shown(value)} is not supported, only {choices}")
        if name not in known and name not in supported and name not in metadata and not name.startswith("_"):
            problems.append(f"unknown field {name} = {shown(value)}, which may change what the model computes")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems[:5])}")
    return cls(**values)


def shown(value: Any) -> str:
    """Return a value as errors show it: at most one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _schema(cls: Any) -> type[pydantic.BaseModel]:
    """Return a pydantic model of a dataclass's fields; it accepts dictionaries even where types are strict."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default)
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    return pydantic.create_model(cls.__name__, **fields)
