"""Reads what a model's folder says: its list of components, and their config.json files."""

import re
from typing import Annotated, Any

import pydantic
from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import conform, read_json
from dpo_jax.models.config_json import MAX_BYTES
from dpo_jax.weights.hub import find_model
from dpo_jax.weights.io import weight_files


def find_component(name: str, component: str) -> epath.Path:
    """Return the folder or file of one component, by its own name or its model's, local or on the hub."""
    return path_of(find_model(name, only={component}), component)


def files_of(path: epath.Path, variant: str = "") -> list[epath.Path]:
    """Return the files with the weights of a component: those in its folder, or the single file."""
    return weight_files(path, variant) if path.is_dir() else [path]


def path_of(model: epath.Path, component: str) -> epath.Path:
    """Return the path of a model's component: the single file, its subfolder, or a folder that holds it alone."""
    _refuse_work_directory(model)
    alone = not (model / "model_index.json").exists() and (model / "config.json").exists()
    return model if model.is_file() or alone else model / component


def read_model_index(folder: epath.Path) -> dict[str, Any]:
    """Return the folder's list of components; MissingFileError if there is none."""
    path = folder / "model_index.json"
    _refuse_work_directory(folder)
    files = [file.name for file in folder.iterdir() if file.suffix == ".safetensors"] if folder.is_dir() else []
    if not path.exists() and files:
        raise MissingFileError(
            f"{folder} is not a diffusers model folder; if the model is {files[0]}, give the path of that file"
        )
    if not path.exists():
        raise MissingFileError(
            f"{folder} is not a diffusers model folder: {path} does not exist; give the path of a downloaded model, "
            f"for example from: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir {folder}"
        )
    model_index = read_config_json(path)
    conform(model_index, ModelIndex, str(path))
    for name, value in model_index.items():
        if isinstance(value, list):
            conform({name: value}, dict[str, Part], str(path))
            if not re.fullmatch(r"\w+", name):
                raise UserError(f"{path}: {name!r} is not the name of a component")
    return model_index


Part = Annotated[list[str | None], pydantic.Field(min_length=2, max_length=2)]
"""A component's [library, class]."""


class ModelIndex(pydantic.BaseModel):
    """The fields of model_index.json that are read."""

    class_name: Annotated[str, pydantic.Field(alias="_class_name")]
    unet: Part | None = None
    transformer: Part | None = None
    vae: Part | None = None
    scheduler: Part | None = None
    text_encoder: Part | None = None
    text_encoder_2: Part | None = None
    tokenizer: Part | None = None
    tokenizer_2: Part | None = None
    text_encoder_3: Part | None = None
    tokenizer_3: Part | None = None
    force_zeros_for_empty_prompt: bool | None = None


def read_config_json(path: epath.Path) -> dict[str, Any]:
    """Return a config that model_index.json lists; MissingFileError if it is not there."""
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist, but model_index.json lists {path.parent.name}; download the model again"
        )
    return read_json(path, dict[str, Any], MAX_BYTES)


def component_config(folder: epath.Path, weights: epath.Path, component: str) -> tuple[dict[str, Any], str]:
    """Return the component's config and its path, for error messages; the configs of a single file are in `folder`."""
    path = config_path(folder, weights, component)
    return read_config_json(path), str(path)


def config_path(folder: epath.Path, weights: epath.Path, component: str) -> epath.Path:
    """Return the path of the component's config; see `component_config`."""
    return (weights if weights.is_dir() else folder / component) / "config.json"


def _refuse_work_directory(folder: epath.Path) -> None:
    if (folder / "checkpoints").exists():
        raise UserError(
            f"{folder} is the work directory of a training run; export it first: "
            f"python -m dpo_jax.export --workdir={folder} --output=NEW_FOLDER"
        )
