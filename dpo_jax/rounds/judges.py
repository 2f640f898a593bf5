"""The judges that an online config names: of images, and of latents."""

import re

from etils import epath
from ml_collections import ConfigDict

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.models.model_folder import files_of, find_component
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rewards import JUDGES, Judge, open_judge
from dpo_jax.sharding import Placement
from dpo_jax.weights.io import fingerprint
from dpo_jax.weights.layout import Params


def open_judges(config: ConfigDict) -> list[Judge]:
    """Open the judges of `online.judges`; errors name the field and what to write.

    Judges compute in float32 whatever the model's dtype: candidates differ in details only, and their order counts.
    """
    judges = []
    for spec in config.online.judges:
        try:
            judges.append(open_judge(spec))
        except (UserError, FileNotFoundError) as error:
            name = spec.partition("=")[0]
            known = JUDGES.get(name)
            example = f"{name}={'SOURCE' if known.needs else ''}".rstrip("=") if known else "jpeg_compressibility"
            kind = type(error) if isinstance(error, UserError) else MissingFileError
            raise kind(
                f"config.online.judges={config.online.judges}: {error}; write for example "
                f"--config.online.judges=\"('{example}',)\""
            ) from error
    return judges


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
