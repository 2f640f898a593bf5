"""What comes with dpo_jax: configs by their names, and the files of the tiny model."""

import difflib
import re
from pathlib import Path

from dpo_jax.errors import MissingFileError

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"


def config_names() -> list[str]:
    """Return the names that --config takes in place of a path."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def find_config(spec: str) -> str:
    """Return `spec`, NAME, NAME:variant, FILE or FILE:variant, with the path of the config file in place of a name.

    Raises MissingFileError if there is neither such a file nor such a config.
    """
    name, colon, variant = spec.partition(":")
    if Path(name).is_file():
        return spec
    if re.fullmatch(r"\w+", name) and (CONFIGS / f"{name}.py").is_file():
        return f"{CONFIGS / name}.py{colon}{variant}"
    names = config_names()
    near = difflib.get_close_matches(Path(name).stem, names, n=1, cutoff=0.5)
    hint = f"did you mean --config={near[0]}? " if near else ""
    raise MissingFileError(f"no config file {name}; {hint}The configs that come with dpo_jax are {', '.join(names)}")


def package_path(path: str) -> str:
    """Return the path of a file of the package, given from the root of the repository: "dpo_jax/tiny/model".

    The path stays as it is in the root of the repository, and wherever it exists.
    """
    inside = PACKAGE.parent / path
    return str(inside) if inside.exists() and not Path(path).exists() else path
