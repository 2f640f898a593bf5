"""Data sets of the Hugging Face hub: their files are fetched into the hub's usual cache, and read from there."""

import fnmatch
import re
from pathlib import Path

from dpo_jax.errors import MissingFileError, UserError

PREFIX = "hub:"
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?"
    r"(/(?P<pattern>.+))?",
    re.ASCII,
)
READ = "*.parquet", "*.tar"
"""Files that contain their images."""


def fetch(name: str) -> list[Path]:
    """Return the files of a data set on the hub, fetched if they are not in the cache.

    Args:
        name: hub:OWNER/NAME, optionally followed by @REVISION, and by /PATTERN for some of its files. By default these
            are its .parquet and .tar files; if some are named after a split "train", only those.

    Raises:
        FileNotFoundError: there is no such data set, or it is neither in the cache nor reachable.
        ValueError: the name is malformed, or no file matches.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    from dpo_jax.hub import errors_told

    found = HUB_ID.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        raise UserError(
            f"{name} does not name a data set on the hub; write hub:OWNER/NAME, hub:OWNER/NAME@REVISION or "
            "hub:OWNER/NAME/data/train-*.parquet"
        )
    repo, revision, pattern = found["repo"], found["revision"], found["pattern"]

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))

    advice = f"{_download(repo)}, and give the path of its files as --input"
    with errors_told(name, repo, "data set", revision=revision, download=advice):
        folder = download(["README.md", ".gitattributes"])  # makes the hub's library list the files, and keep the list
        try:
            tree = get_cached_repo_tree(repo, repo_type="dataset", revision=revision)
            paths = sorted(file.path for file in tree)
        except CachedRepoTreeNotFoundError:  # there is no network, and an earlier version kept no list
            paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        wanted = _choose(name, paths, pattern)
        folder = download([re.sub(r"([*?[])", r"[\1]", path) for path in wanted])
    absent = [path for path in wanted if not (folder / path).is_file()]
    if absent:
        raise MissingFileError(
            f"{absent[0]} of the data set {repo} is neither in the cache nor reachable on the hub; run the command "
            "again with a network"
        )
    return [folder / path for path in wanted]


def _choose(name: str, paths: list[str], pattern: str | None) -> list[str]:
    """Return the files to read; UserError if there are none."""
    if pattern is not None:
        chosen = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    else:
        chosen = [path for path in paths if any(fnmatch.fnmatchcase(path, kind) for kind in READ)]
        chosen = [path for path in chosen if re.search(r"(^|[/_.-])train([/_.-]|$)", path)] or chosen
    if not chosen:
        repo = "/".join(name.removeprefix(PREFIX).split("@")[0].split("/")[:2])
        raise UserError(
            f"{name}: the data set has no file {pattern or ' or '.join(READ)} (it has {', '.join(paths)[:500]}). If "
            f"its images are files of their own, run {_download(repo)} and give the paths of its tables as --input"
        )
    return chosen


def _download(repo: str) -> str:
    """Return the command that fetches all of a data set."""
    return f"hf download --repo-type dataset {repo} --local-dir data/{repo.split('/')[1]}"
