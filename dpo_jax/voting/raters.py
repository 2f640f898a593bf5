"""Who may vote as whom. A name belongs to who gave it first, by a card that only this person's browser has."""

import hmac
import re
import secrets
from urllib.parse import quote, unquote, urlencode

from dpo_jax.voting.store import Store

LONGEST_NAME = 64


class Raters:
    """The raters of a study.

    Args:
        is_open: whether anybody with the link may take a name, or only those who were invited.
    """

    def __init__(self, store: Store, is_open: bool = True):
        self._store, self.is_open = store, is_open

    def join(self, name: str, key: str = "") -> str | None:
        """A card for a name that nobody has; None if it's taken.

        Args:
            key: a secret of the browser's own, so that asking once more, after a reply was lost, gives the same card.
        """
        claim = self._store.opaque("claim", name, key) if key else secrets.token_hex()
        return self.card(name) if self._store.join(name, claim) else None

    def invite(self, name: str) -> str:
        """The card of a name, whether somebody has it or not: for whoever runs the study."""
        self._store.join(name, secrets.token_hex())
        return self.card(self._store.name_of(name) or name)

    def holder(self, card: str) -> str:
        """The name on a card; "" if it isn't one. What is wrong with it makes no difference in time."""
        quoted, _, shown = card.rpartition(".")
        name = clean_name(unquote(quoted))
        expected = self._store.opaque("rater", name)
        return name if hmac.compare_digest(shown.encode("utf-8", "replace"), expected.encode()) and name else ""

    def card(self, name: str) -> str:
        """What shows that somebody has this name: for nobody else's eyes."""
        return f"{quote(name, safe='')}.{self._store.opaque('rater', name)}"


def rater_link(token: str | None, card: str) -> str:
    """The path of a rater's own link, from the root of the page."""
    return "/?" + urlencode({"token": token, "rater": card} if token else {"rater": card})


_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Letters and marks that show nothing, of which a second "ann" could be made."""


def clean_name(name: object) -> str:
    """A rater's name without what can't be seen; "" if it can't be a name."""
    if not isinstance(name, str):
        return ""
    name = " ".join(_UNSEEN.sub("", name).split())
    return name if len(name) <= LONGEST_NAME and name.isprintable() else ""
