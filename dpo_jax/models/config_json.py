"""Reading a checkpoint's config.json into a frozen dataclass, refusing what this code would compute differently."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_config(
    cls: type[Config],
    config: Mapping[str, Any],
    where: str,
    *,
    supported: Mapping[str, Collection[Any]],
    metadata: Collection[str] = (),
) -> Config:
    """Builds the dataclass `cls`, whose defaults are the original library's.

    A field in `supported` must have a value listed there. Every other field must be one of `cls`, or change no output:
    named in `metadata` or beginning with an underscore. Anything else raises a ValueError naming `where` and the field.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, value in config.items():
        if name in supported and value not in supported[name]:
            choices = " or ".join(map(repr, supported[name]))
            raise ValueError(f"{where}: {name} = {value!r} is not supported, only {choices}")
        if name not in known and name not in supported and name not in metadata and not name.startswith("_"):
            raise ValueError(f"{where}: unknown field {name} = {value!r}, which may change what the model computes")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known})
