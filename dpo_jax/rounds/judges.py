"""The judges that an online config names: of images, and of latents."""

import re
from collections.abc import Callable
from typing import TypeVar

from etils import epath
from ml_collections import ConfigDict

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.models.model_folder import files_of, find_component
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rewards import JUDGES, Judge, find_judge, open_judge
from dpo_jax.sharding import Placement
from dpo_jax.weights.io import fingerprint
from dpo_jax.weights.layout import Params

_Found = TypeVar("_Found")


def open_judges(config: ConfigDict) -> tuple[list[Judge], list[Judge]]:
    """Open the judges of `online.judges` and of `online.watched_judges`; errors name the field and what to write.

    Judges compute in float32 whatever the model's dtype: candidates differ in details only, and their order counts.
    """
    fields = ("judges", "watched_judges")
    for field in fields:  # before any of them is loaded
        _each(config, field, find_judge)
    judges, watched = (_each(config, field, open_judge) for field in fields)
    return judges, watched


def _each(config: ConfigDict, field: str, function: Callable[[str], _Found]) -> list[_Found]:
    """Return the function's results for the judges of a field of `config.online`."""
    found = []
    for spec in config.online[field]:
        try:
            found.append(function(spec))
        except (UserError, FileNotFoundError) as error:
            name = spec.partition("=")[0]
            known = JUDGES.get(name)
            example = f"{name}={'SOURCE' if known.needs else ''}".rstrip("=") if known else "jpeg_compressibility"
            kind = type(error) if isinstance(error, UserError) else MissingFileError
            raise kind(
                f"config.online.{field}={config.online[field]}: {error}; write for example "
                f"--config.online.{field}=\"('{example}',)\""
            ) from error
    return found


def find_latent_judge(config: ConfigDict, pipeline: Pipeline) -> dict[str, epath.Path]:
    """Return where the denoisers "tuned" and "reference" of `online.latent_judge` are; empty without a latent judge.

    Raises:
        UserError: one of them is missing, or is not a denoiser like the policy's.
    """
    spec = config.online.latent_judge
    if not spec:
        return {}
    tuned, *rest = re.split(r":(?!//)", spec)  # not the colon of gs://bucket
    if not tuned or len(rest) > 1:
        raise UserError(
            f"config.online.latent_judge={spec} must be TUNED:REFERENCE, two models or denoisers, or TUNED alone"
        )
    name = pipeline.denoiser_name
    paths = {"tuned": find_component(tuned, name), "reference": pipeline.weights[name]}
    if rest and rest[0]:
        paths["reference"] = find_component(rest[0], name)
    for path in paths.values():
        if not pipeline.has_denoiser_like(path):
            raise UserError(
                f"config.online.latent_judge={spec}: {path} has another architecture than the {name} of {config.model}"
            )
    return paths


def latent_judge_fingerprints(paths: dict[str, epath.Path], variant: str) -> dict[str, str]:
    """Return fields for config.json about the denoisers that `find_latent_judge` returned."""
    return {f"fingerprints.latent_judge.{role}": fingerprint(files_of(path, variant)) for role, path in paths.items()}


def load_latent_judge(config: ConfigDict, pipeline: Pipeline, placement: Placement) -> dict[str, Params]:
    """Load the denoisers that `find_latent_judge` returns."""
    return {
        role: pipeline.load(pipeline.denoiser_name, dtype=pipeline.dtype, sharding=placement, path=path)
        for role, path in find_latent_judge(config, pipeline).items()
    }
