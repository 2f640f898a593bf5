"""A model by name: a folder or file that exists, or an id on the Hugging Face hub.

A hub repository holds each network many times over (fp16 copies, pickles, ONNX, OpenVINO, single files: 72 GB for
SDXL base). `files_to_fetch` picks the one set that `weights/io.py` would read. Files land in the hub's usual cache, and
what is there opens without a network.
"""

import glob
import re
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from etils import epath
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.weights.io import CONVERT_PICKLE, PICKLES, SAFETENSORS, preferred_weights
from dpo_jax.weights.lora_metadata import FILES, PEFT_CONFIG

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2")

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>.+\.safetensors))?(@(?P<revision>[\w./-]+))?"
)


def find_lora(name: str) -> epath.Path:
    """The file or folder of the LoRA called `name`, here or on the hub; see `find_model` for names and errors."""
    return find_model(name, files=(*FILES, PEFT_CONFIG))


def find_model(
    name: str,
    *,
    revision: str = "",
    variant: str = "",
    only: Collection[str] | None = None,
    weights: bool = True,
    files: Collection[str] = (),
) -> epath.Path:
    """The folder (or the one file) that holds the model called `name`, fetched from the hub where it must be.

    Args:
        name: an existing folder or file, returned as it is; else a hub id: `owner/name`, or with `/file.safetensors`,
            or with `@revision` at its end.
        revision: branch, tag or commit on the hub, where the name has none.
        variant: "fp16" takes the half-precision set of weights from the hub where there is one.
        only: the components that are needed, such as {"unet"}; all by default. A repository that is one component, with
            its config.json at the root, is fetched in any case.
        weights: False fetches configs and tokenizers alone.
        files: these instead of a model's; beside a `file.safetensors`, these of its folder as well.

    Raises FileNotFoundError where nothing has that name or the hub can't be reached, and ValueError where what it names
    is no model that can be read here.
    """
    path = epath.Path(name).expanduser()
    if path.exists():
        return path
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise MissingFileError(
            f"no folder or file {name}, and it is no hub id either (owner/name, or owner/name/file.safetensors)"
        )
    repo, file, revision = hub_id["repo"], hub_id["file"], hub_id["revision"] or revision
    try:
        if file is None and not files:
            return _fetch_folder(repo, revision or None, variant, only, weights)
        folder = (file or "").rpartition("/")[0]
        patterns = [file] if file else []
        patterns += [f"{folder}/{name}".removeprefix("/") for name in files]
        patterns = [glob.escape(pattern) for pattern in patterns]
        path = epath.Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns)) / (file or "")
    except RevisionNotFoundError as error:
        raise MissingFileError(f"{repo} on the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"no folder or file {name} here, and no model {repo} on the hub that you may read (a private or gated one "
            "needs `hf auth login`, and its terms accepted on its page)"
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        # The hub's library wraps the cause, and tells of it in several lines.
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        options = f"{_patterns(file or ' '.join(files), only, weights)}{f' --revision {revision}' if revision else ''}"
        raise MissingFileError(
            f"no folder or file {name} here, and its files can't all be had from the hub or its cache ({reason}); on a "
            f"machine with a network run: hf download {repo} {options} "
            f"--local-dir models/{repo.partition('/')[2]}, and give the path of that {'file' if file else 'folder'}"
        ) from error
    if not path.exists():
        raise MissingFileError(f"no file {name} here, and {repo} on the hub holds no {file}")
    return path


def files_to_fetch(
    repo_files: Collection[str],
    where: str,
    *,
    variant: str = "",
    only: Collection[str] | None = None,
    weights: bool = True,
) -> list[str]:
    """Those of a repository's files that make up the model: configs, tokenizers and one set of weights a network.

    Of several sets, the one that `weights.io.load_params` prefers; with `variant`, first one of that variant. What the
    model is not computed by (safety checker, other VAEs) is left. Raises ValueError, naming `where`, if a network has
    no weights that can be read here, or there is no network.
    """
    if variant and not any(f".{variant}." in file for file in SAFETENSORS):
        raise UserError(f"{where}: unknown variant {variant!r} of weights, expected 'fp16' or nothing")
    names_in = defaultdict(set)
    for file in repo_files:
        folder, _, name = file.rpartition("/")
        names_in[folder].add(name)
    is_pipeline = "model_index.json" in names_in[""]
    networks = [folder for folder in NETWORKS if _is_wanted(folder, only) and "config.json" in names_in[folder]]
    if not is_pipeline and "config.json" in names_in[""]:
        networks.append("")  # the root
    if not networks:
        needed = " or ".join(sorted(only or NETWORKS))
        raise UserError(f"{where} is no model for diffusers: it has no {needed} with a config.json")

    wanted = ["model_index.json"] if is_pipeline else []
    for folder in WITHOUT_WEIGHTS:
        if _is_wanted(folder, only):
            wanted += [f"{folder}/{name}" for name in sorted(names_in[folder]) if name.endswith((".json", ".txt"))]
    unreadable, pickled = [], False
    for network in networks:
        names = names_in[network]
        chosen = _one_set_of_weights(names, variant) if weights else []
        wanted += [f"{network}/{name}".removeprefix("/") for name in ("config.json", *chosen)]
        if weights and not chosen:
            unreadable.append(network or "the model at its root")
            pickled |= any(name.endswith(PICKLES) for name in names)
    if unreadable:
        kind, advice = ("only pickled", f"; {CONVERT_PICKLE}") if pickled else ("no", "")
        raise UserError(f"{where} holds {kind} weights for {', '.join(unreadable)}{advice}")
    return wanted


def _fetch_folder(
    repo: str, revision: str | None, variant: str, only: Collection[str] | None, weights: bool
) -> epath.Path:
    # Fetching the configs makes the hub's library list the repository, and keep that list for when there is no network.
    configs = ["model_index.json", "config.json"]
    configs += [f"{folder}/config.json" for folder in NETWORKS if _is_wanted(folder, only)]
    folder = snapshot_download(repo, revision=revision, allow_patterns=configs)
    try:
        repo_files = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
    except CachedRepoTreeNotFoundError:  # no network, and cached by a version that kept no list
        repo_files = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")]
    wanted = files_to_fetch(repo_files, repo, variant=variant, only=only, weights=weights)
    if variant and weights and not any(f".{variant}" in file for file in wanted):
        print(f"{repo} on the hub has no {variant} weights; fetching its plain ones", file=sys.stderr)
    return epath.Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _is_wanted(folder: str, only: Collection[str] | None) -> bool:
    return only is None or folder in only


def _one_set_of_weights(names: Collection[str], variant: str) -> list[str]:
    """The names of the preferred file of weights, or of an index and its shards; none where there are no weights."""
    first = preferred_weights(names, variant)
    if first is None or not first.endswith(".json"):
        return [first] if first else []
    # A variant's shards are "model.fp16-00001-of-00002.safetensors", or "model-00001-of-00002.fp16.safetensors".
    stem, _, ending = first.partition(".safetensors.index")
    label = re.escape(ending.removesuffix(".json"))
    shard = re.compile(rf"{stem}({label}-\d+-of-\d+|-\d+-of-\d+{label})\.safetensors")
    return [first, *sorted(name for name in names if shard.fullmatch(name))]


def _patterns(file: str | None, only: Collection[str] | None, weights: bool) -> str:
    """The arguments by which `hf download` fetches the same, but for copies that only a list of files would tell."""
    if file:
        return file
    patterns = ["*.json", "*.txt"]
    if weights:  # at the root of a whole model lie single files of everything
        patterns.append("*/*.safetensors" if only is None else "*.safetensors")
    return " ".join(f"--include '{pattern}'" for pattern in patterns)
