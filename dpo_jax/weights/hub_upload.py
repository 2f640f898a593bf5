"""Uploads an exported folder to a new model repository of the Hugging Face hub."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dpo_jax.errors import EnvironmentFault, ExistingFileError, UserError
from dpo_jax.hub import reason

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_upload(repo: str, output: str | os.PathLike[str]) -> None:
    """Check, before any work, that the folder `output` can be uploaded to `repo` later.

    Args:
        repo: OWNER/NAME of a model repository that does not exist, or holds no files yet.
        output: folder that will be uploaded; it need not exist.

    Raises:
        UserError: the name is malformed, the user is not logged in with a token that may write, the repository holds
            files already, the hub cannot be reached, or `output` is not on this machine.
    """
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"--push_to_hub={repo} is not the name of a repository on the hub; write OWNER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push_to_hub={repo} is not the name of a repository on the hub ({str(error).rstrip('.')})"
        ) from error
    if "://" in os.fspath(output):
        raise UserError(
            f"--push_to_hub uploads a local folder, but --output={os.fspath(output)} is not local; choose a local one"
        )
    api = HfApi()
    try:
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"--push_to_hub={repo}: the token of {user.get('name')} may only read; {LOGIN}")
        files = set(api.list_repo_files(repo)) - {".gitattributes"}
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push_to_hub={repo}: this machine has no token for the hub; {LOGIN}") from error
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError) as error:
        if _status(error) == 401:
            raise UserError(f"--push_to_hub={repo}: the hub does not accept this machine's token; {LOGIN}") from error
        raise EnvironmentFault(
            f"--push_to_hub={repo}: the hub cannot be asked ({reason(error)}); export without --push_to_hub, and "
            f"later run hf upload {repo} FOLDER . --private"
        ) from error
    if files:
        raise ExistingFileError(
            f"--push_to_hub={repo}: the repository already holds files ({', '.join(sorted(files)[:3])}); choose a new "
            f"name, or export without --push_to_hub and add to it with hf upload {repo} FOLDER ."
        )


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder as the model repository `repo`, created if it does not exist, and return its address.

    Args:
        folder: local folder with everything to upload.
        repo: OWNER/NAME.
        private: True creates a repository that only its owner can see. An existing repository stays as it is.
        message: message of the commit.

    Raises:
        UserError: the hub refuses, or cannot be reached. The folder stays, and the message says how to continue.
    """
    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # all the hub's libraries can raise
        refused = _status(error) in (401, 403)
        advice = f"your token must be allowed to write to {repo.split('/')[0]}" if refused else "the folder is complete"
        visibility = " --private" if private else ""
        raise EnvironmentFault(
            f"exported to {folder}, but could not upload it to {repo} ({reason(error)}); {advice}: run "
            f"hf upload {repo} {folder} .{visibility}"
        ) from error
    return url


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
