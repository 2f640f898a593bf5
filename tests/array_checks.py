"""The type checker of the tests: beartype, which here also checks the arrays in NamedTuples."""

import functools
import inspect
import operator
import typing
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any

from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import jaxtyped

CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float too


def checked(function: Callable) -> Callable:
    """Return the function with a check of its arguments and result; jaxtyping's import hook calls it."""
    function.__annotations__ = {name: _with_fields(hint) for name, hint in function.__annotations__.items()}
    return beartype(function, conf=CONF)


def agrees(value: Any) -> bool:
    """Return whether the arrays of a NamedTuple have the annotated dtypes and shapes, with one size per axis name."""
    with jaxtyped("context"):
        return _fields_agree(value)


def _fields_agree(value: Any) -> bool:
    hints, defaults = typing.get_type_hints(type(value), include_extras=True), type(value)._field_defaults
    return all(
        (name in defaults and field is defaults[name]) or is_bearable(field, _with_fields(hints[name]), conf=CONF)
        for name, field in value._asdict().items()
    )


def _with_fields(hint: Any) -> Any:
    """Return the type hint with a check of the fields of each NamedTuple in it."""
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return Annotated[hint, Is[_fields_agree]]
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return functools.reduce(operator.or_, map(_with_fields, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(map(_with_fields, typing.get_args(hint)))]
    return hint
