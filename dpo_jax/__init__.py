"""dpo_jax: align text-to-image diffusion models with human preferences, in JAX.

Importing it is cheap. These come with what they need when they are first asked for:

  dpo_jax.prepare      make a data set of preference data
  dpo_jax.train        fine-tune a model on it
  dpo_jax.load_model   a model or a training run, ready to draw: load_model("runs/mine").sample("a red circle")
  dpo_jax.open_judge   a judge, which scores images
  dpo_jax.evaluate     compare models
  dpo_jax.export       write a model in the format of other tools

The commands, `dpo_jax COMMAND` or `python -m dpo_jax.COMMAND`, do the same with flags.
"""

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

from dpo_jax import backend, interrupts

if TYPE_CHECKING:
    from dpo_jax.api.evaluation import evaluate as evaluate
    from dpo_jax.api.models import export as export
    from dpo_jax.api.models import load_model as load_model
    from dpo_jax.api.preparation import prepare as prepare
    from dpo_jax.api.training import train as train
    from dpo_jax.rewards import open_judge as open_judge

# A command begins: cli.run takes over when all is imported.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "dpo_jax":
    interrupts.leave_at_once()

__version__ = "0.1.0"

OFFERED = {
    "evaluate": "dpo_jax.api.evaluation",
    "export": "dpo_jax.api.models",
    "load_model": "dpo_jax.api.models",
    "open_judge": "dpo_jax.rewards",
    "prepare": "dpo_jax.api.preparation",
    "train": "dpo_jax.api.training",
}
"""The functions that are imported when they are first asked for, and where they are."""


def __getattr__(name: str) -> Any:
    if name in OFFERED:
        return getattr(importlib.import_module(OFFERED[name]), name)
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *OFFERED]


class _Package(types.ModuleType):
    """Keeps `dpo_jax.train` the function when the module of the command of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in OFFERED and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


backend.set_variables()
