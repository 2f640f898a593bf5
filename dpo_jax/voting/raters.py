"""Names of raters. A name belongs to the person who gave it first, and whose browser holds the credential for it."""

import hmac
import re
import secrets
from urllib.parse import quote, unquote, urlencode

from dpo_jax.voting.store import Store

MAX_NAME_LENGTH = 64


class Raters:
    """The raters of a study.

    Args:
        store: the file of votes.
        is_open: whether everybody with the link may take a name, or only invited raters.
    """

    def __init__(self, store: Store, is_open: bool = True):
        self._store, self.is_open = store, is_open

    def join(self, name: str, key: str = "") -> str | None:
        """Take a name and return its credential, or None if somebody else has taken it.

        Args:
            name: the name.
            key: a secret of the browser. A repeated request with the same key, after a lost reply, succeeds again.
        """
        claim = self._store.opaque("claim", name, key) if key else secrets.token_hex()
        return self.credential(name) if self._store.join(name, claim) else None

    def invite(self, name: str) -> str:
        """Return the credential of a name, taken or not. Only for the person who runs the study."""
        self._store.join(name, secrets.token_hex())
        return self.credential(self._store.name_of(name) or name)

    def holder(self, credential: str) -> str:
        """Return the name of a credential, "" if it is not valid. The time does not tell what is wrong with it."""
        quoted, _, shown = credential.rpartition(".")
        name = clean_name(unquote(quoted))
        expected = self._store.opaque("rater", name)
        return name if hmac.compare_digest(shown.encode("utf-8", "replace"), expected.encode()) and name else ""

    def credential(self, name: str) -> str:
        """Return the secret text that proves that somebody has this name."""
        return f"{quote(name, safe='')}.{self._store.opaque('rater', name)}"


def rater_link(token: str | None, credential: str) -> str:
    """Return the path and query of a rater's own link."""
    return "/?" + urlencode({"token": token, "rater": credential} if token else {"rater": credential})


_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Invisible characters, with which somebody could make a second "ann"."""


def clean_name(name: object) -> str:
    """Return a rater's name without invisible characters, or "" if it is not a valid name."""
    if not isinstance(name, str):
        return ""
    name = " ".join(_UNSEEN.sub("", name).split())
    return name if len(name) <= MAX_NAME_LENGTH and name.isprintable() else ""
