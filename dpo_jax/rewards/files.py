"""Finds the files of a judge: its weights, and their config and tokenizer."""

from collections.abc import Sequence

from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.weights.hub import find_model
from dpo_jax.weights.io import CONVERT_STATE_DICT, preferred_weights

CLIP_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
CLIP_FILES = ("config.json", "model.safetensors", *CLIP_TOKENIZER)


def find_weights(source: str, model: str = "CLIPModel") -> epath.Path:
    """Return the folder in transformers' layout, or the .safetensors file, that a path or hub id names.

    Raises MissingFileError where there is none; UserError with the command that converts it where it is a pickle.
    """
    path = _find(source)
    if path.is_dir() and preferred_weights([file.name for file in path.iterdir()]) is None:
        raise UserError(
            f"{source} has no model.safetensors; if it has a pytorch_model.bin, transformers converts it: python -c "
            f"\"import transformers; transformers.{model}.from_pretrained('{source}').save_pretrained('NEW_FOLDER')\""
        )
    return path


def find_file(source: str) -> epath.Path:
    """Return the .safetensors file that a path or hub id names; raises as `find_weights`."""
    path = _find(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the .safetensors file in it")
    return path


def find_beside(weights: epath.Path, files: Sequence[str], needed: Sequence[str], hub_id: str) -> epath.Path:
    """Return the folder that has one of the `needed` files: that of the weights, otherwise `files` of the hub id."""
    folder = weights if weights.is_dir() else weights.parent
    if any((folder / name).exists() for name in needed):
        return folder
    try:
        return find_model(hub_id, files=files)
    except OSError as error:
        raise MissingFileError(
            f"{weights.name} needs {' or '.join(needed)} beside it, but {folder} has none and {hub_id} cannot be "
            f"fetched ({error}); copy {', '.join(files)} of {hub_id} there"
        ) from error


def _find(source: str) -> epath.Path:
    path = find_model(source, files=CLIP_FILES)
    if path.is_file() and path.suffix != ".safetensors":
        convert = CONVERT_STATE_DICT.format(file=path, stem=path.with_suffix(""))
        raise UserError(f"{path} is not a .safetensors file; {convert}")
    return path
