"""Finds a model by name: an existing folder or file, or an id on the Hugging Face hub.

A hub repository holds each network in many forms (fp16 copies, pickles, ONNX, OpenVINO, single files: 72 GB for SDXL
base). `files_to_fetch` chooses the one set that `weights/io.py` would read. Files go to the hub's usual cache, and
cached models open without a network.
"""

import glob
import re
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.hub import errors_told
from dpo_jax.weights.io import CONVERT_PICKLE, PICKLES, VARIANTS, preferred_weights
from dpo_jax.weights.lora_metadata import FILES, PEFT_CONFIG

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>.+\.safetensors))?(@(?P<revision>[\w./-]+))?"
)


def find_lora(name: str) -> epath.Path:
    """Return the file or folder of a LoRA, local or fetched from the hub; see `find_model` for names and errors."""
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
    """Return the folder (or the file) of a model, fetched from the hub if it is not on this machine.

    Args:
        name: an existing folder or file, which is returned unchanged, or a hub id: `owner/name`, also with
            `/file.safetensors` or `@revision` at its end.
        revision: branch, tag or commit on the hub, if `name` has none.
        variant: "fp16" or "bf16" fetches the half-precision weights, if the repository has them.
        only: components that are needed, for example {"unet"}; all by default. A repository of one component, with its
            config.json at the root, is fetched in any case.
        weights: False fetches only configs and tokenizers.
        files: names of files to fetch in place of those of a model; with a `file.safetensors`, from its folder.

    Raises:
        MissingFileError: there is no such folder, file or repository, or the hub cannot be reached.
        UserError: the repository does not hold a model that dpo_jax can read.
    """
    path = epath.Path(name).expanduser()
    if path.exists():
        return path
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise MissingFileError(
            f"there is no folder or file {name}, and it is not a hub id (owner/name, or owner/name/file.safetensors)"
        )
    repo, file, revision = hub_id["repo"], hub_id["file"], hub_id["revision"] or revision
    absent = f"there is no folder or file {name}, and "
    options = f"{_patterns(file or ' '.join(files), only, weights)}{f' --revision {revision}' if revision else ''}"
    download = (
        f"hf download {repo} {options} --local-dir models/{repo.partition('/')[2]}, and give the path of that "
        f"{'file' if file else 'folder'}"
    )
    from huggingface_hub import snapshot_download  # 0.2 s that local models do not need

    with errors_told(name, repo, "model", revision=revision, download=download, besides=absent):
        if file is None and not files:
            return _fetch_folder(repo, revision or None, variant, only, weights)
        folder = (file or "").rpartition("/")[0]
        patterns = [file] if file else []
        patterns += [f"{folder}/{name}".removeprefix("/") for name in files]
        patterns = [glob.escape(pattern) for pattern in patterns]
        path = epath.Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns)) / (file or "")
    if not path.exists():
        raise MissingFileError(f"there is no file {name}, and the repository {repo} on the hub has no file {file}")
    return path


def files_to_fetch(
    repo_files: Collection[str],
    where: str,
    *,
    variant: str = "",
    only: Collection[str] | None = None,
    weights: bool = True,
) -> list[str]:
    """Return the files of a repository that make up the model: configs, tokenizers, one set of weights per network.

    Of several sets, it chooses the one that `weights.io.load_params` prefers; with `variant`, one of that variant if
    there is one. It leaves out whatever the model does not compute with (safety checker, other VAEs).

    Raises:
        UserError: a network has no weights that dpo_jax can read, or there is no network; the message names `where`.
    """
    if variant and variant not in VARIANTS:
        known = " or ".join(map(repr, VARIANTS))
        raise UserError(f"{where}: variant={variant!r} is not known; set it to {known}, or leave it empty")
    names_in = defaultdict(set)
    for file in repo_files:
        folder, _, name = file.rpartition("/")
        names_in[folder].add(name)
    is_pipeline = "model_index.json" in names_in[""]
    networks = [folder for folder in NETWORKS if _is_wanted(folder, only) and "config.json" in names_in[folder]]
    if not is_pipeline and "config.json" in names_in[""]:
        networks.append("")  # weights at the root
    if not networks:
        needed = " or ".join(sorted(only or NETWORKS))
        raise UserError(f"{where} is not a diffusers model: it has no {needed} with a config.json")

    wanted = ["model_index.json"] if is_pipeline else []
    for folder in WITHOUT_WEIGHTS:
        if _is_wanted(folder, only):
            wanted += [f"{folder}/{name}" for name in sorted(names_in[folder]) if _is_read(name, names_in[folder])]
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
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    # Fetching the configs makes the hub's library list the repository and keep the list for use without a network.
    configs = ["model_index.json", "config.json"]
    configs += [f"{folder}/config.json" for folder in NETWORKS if _is_wanted(folder, only)]
    folder = snapshot_download(repo, revision=revision, allow_patterns=configs)
    try:
        repo_files = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
    except CachedRepoTreeNotFoundError:  # there is no network, and an earlier version kept no list
        repo_files = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")]
    wanted = files_to_fetch(repo_files, repo, variant=variant, only=only, weights=weights)
    if variant and weights and not any(f".{variant}" in file for file in wanted):
        print(
            f"the repository {repo} on the hub has no {variant} weights; fetching its full-precision ones",
            file=sys.stderr,
        )
    return epath.Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _is_wanted(folder: str, only: Collection[str] | None) -> bool:
    return only is None or folder in only


def _is_read(name: str, names: Collection[str]) -> bool:
    """Return whether this file of a scheduler or a tokenizer is read; sentencepiece's is if there is no other."""
    return name.endswith((".json", ".txt", ".jinja")) or (name == "spiece.model" and "tokenizer.json" not in names)


def _one_set_of_weights(names: Collection[str], variant: str) -> list[str]:
    """Return the names of the preferred file of weights, or of an index and its shards; [] if there are no weights."""
    first = preferred_weights(names, variant)
    if first is None or not first.endswith(".json"):
        return [first] if first else []
    # A variant's shards are "model.fp16-00001-of-00002.safetensors", or "model-00001-of-00002.fp16.safetensors".
    stem, _, ending = first.partition(".safetensors.index")
    label = re.escape(ending.removesuffix(".json"))
    shard = re.compile(rf"{stem}({label}-\d+-of-\d+|-\d+-of-\d+{label})\.safetensors")
    return [first, *sorted(name for name in names if shard.fullmatch(name))]


def _patterns(file: str | None, only: Collection[str] | None, weights: bool) -> str:
    """Return arguments of `hf download` that fetch these files, and copies that only a list of files would exclude."""
    if file:
        return file
    patterns = ["*.json", "*.txt", "*.jinja", "*spiece.model"]
    if weights:  # files at the root of a whole model hold all of it once more
        patterns.append("*/*.safetensors" if only is None else "*.safetensors")
    return " ".join(f"--include '{pattern}'" for pattern in patterns)
