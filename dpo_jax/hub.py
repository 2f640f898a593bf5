"""What the Hugging Face hub's library raises, in one sentence each."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dpo_jax.errors import MissingFileError


@contextlib.contextmanager
def errors_told(
    name: str, repo: str, kind: str, *, revision: str | None, download: str, besides: str = ""
) -> Iterator[None]:
    """Raise MissingFileError with the remedy where the hub's library cannot fetch a repository.

    Args:
        name: what the user gave.
        repo: the id in it.
        kind: what the repository holds: "model" or "data set".
        revision: branch, tag or commit, if one is asked for.
        download: what to run on a machine with a network, and to give in place of the name.
        besides: begins the sentence, for example with what is not on this machine either.
    """
    try:
        yield
    except HFValidationError as error:
        raise MissingFileError(f"{besides}{name} does not name a {kind} on the hub ({reason(error)})") from error
    except RevisionNotFoundError as error:
        raise MissingFileError(f"the {kind} {repo} on the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{besides or 'there is '}no {kind} {repo} on the hub that you may read (a private or gated one needs "
            "`hf auth login`, and its terms accepted on its page)"
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise MissingFileError(
            f"{besides}some files of the {kind} {repo} are neither in the cache nor reachable on the hub "
            f"({reason(error)}); on a machine with a network run: {download}"
        ) from error


def reason(error: Exception) -> str:
    """Return the first line about what an error comes from; the hub's library describes it in several."""
    return str(error.__cause__ or error).partition("\n")[0].rstrip(".")
