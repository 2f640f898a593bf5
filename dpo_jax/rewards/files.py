"""Where a judge's files lie: its weights, and the config and tokenizer that belong to them."""

from collections.abc import Sequence

from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.weights.hub import find_model
from dpo_jax.weights.io import CONVERT_STATE_DICT, preferred_weights

CLIP_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
CLIP_FILES = ("config.json", "model.safetensors", *CLIP_TOKENIZER)


def find_weights(source: str) -> epath.Path:
    """The folder of a CLIP as transformers writes it, or the .safetensors file, that `source` names here or on the hub.

    Raises FileNotFoundError where there is none, ValueError with what converts it where it is a pickle.
    """
    path = _find(source)
    if path.is_dir() and preferred_weights([file.name for file in path.iterdir()]) is None:
        raise UserError(
            f"{source} has no model.safetensors; if it has a pytorch_model.bin, transformers converts it: python -c "
            f"\"import transformers; transformers.CLIPModel.from_pretrained('{source}').save_pretrained('NEW_FOLDER')\""
        )
    return path


def find_file(source: str) -> epath.Path:
    """As `find_weights`, of what is one file."""
    path = _find(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the .safetensors file")
    return path


def find_beside(weights: epath.Path, files: Sequence[str], needed: Sequence[str], hub_id: str) -> epath.Path:
    """The folder that holds one of `needed`: that of the weights, or else `hub_id`, of which `files` are fetched."""
    folder = weights if weights.is_dir() else weights.parent
    if any((folder / name).exists() for name in needed):
        return folder
    try:
        return find_model(hub_id, files=files)
    except OSError as error:
        raise MissingFileError(
            f"{folder} has no {' or '.join(needed)}, which {weights.name} needs beside it: copy {', '.join(files)} of "
            f"{hub_id} there ({error})"
        ) from error


def _find(source: str) -> epath.Path:
    path = find_model(source, files=CLIP_FILES)
    if path.is_file() and path.suffix != ".safetensors":
        convert = CONVERT_STATE_DICT.format(file=path, stem=path.with_suffix(""))
        raise UserError(f"{path} is no .safetensors file; {convert}")
    return path
