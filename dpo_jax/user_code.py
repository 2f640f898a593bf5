"""Import an object of the user's own: `python=MODULE:NAME` on the command line."""

import importlib
import os
import sys
from typing import Any

from dpo_jax.errors import UserError


def import_object(source: str, kind: str) -> Any:
    """Return the object that `MODULE:NAME` names, from the working directory or the environment.

    Args:
        source: module and name.
        kind: what it should be, for messages, for example "function".

    Raises:
        UserError: there is no such module or object, or importing raises.
    """
    module_name, _, name = source.partition(":")
    if not module_name or not name:
        raise UserError(f"python={source} does not name a {kind}; write python=module:{kind}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            message = f"there is no module {missing} in the working directory or the environment"
        else:
            message = f"importing {module_name} raises {type(error).__name__}: {_short(str(error))}"
        raise UserError(f"python={source} can't be opened: {message}") from error
    if not hasattr(module, name):
        raise UserError(f"python={source} can't be opened: {module_name} has no {kind} {name}")
    return getattr(module, name)


def _short(text: str) -> str:
    """Return the text on one line, cut to 200 characters."""
    text = " ".join(text.split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or "nothing"
