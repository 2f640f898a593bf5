"""What the SQLite file of votes consists of.

Table `votes` has a row for each vote: rater, task, question, answer (JSON numbers, one for each image of the task, in
the order of `tasks.images`), shown (JSON: which image stood at each place, from left to right) and time (UTC). Rater,
task and question are unique. What a rater took back is in `undone`, and who may vote is in `raters`. `tasks` and
`folders` say what was shown, so that the file can be exported by itself.

SQLite notices damage to its own structures only. Rows therefore carry a checksum, keyed with the file's secret.
"""

import datetime
import hashlib
import json
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpo_jax.errors import UserError

APPLICATION_ID = 0x64706F76  # "dpov"; SQLite keeps it in the file's header
VERSION = 1
SCHEMAS = (
    """
CREATE TABLE study (mode TEXT NOT NULL, digest TEXT NOT NULL, secret TEXT NOT NULL);
CREATE TABLE folders (position INTEGER PRIMARY KEY, path TEXT NOT NULL);
CREATE TABLE tasks (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL, prompt TEXT NOT NULL, seed INTEGER, category TEXT NOT NULL,
    images TEXT NOT NULL
);
CREATE TABLE votes (
    rater TEXT NOT NULL, task TEXT NOT NULL REFERENCES tasks (id), question TEXT NOT NULL, answer TEXT NOT NULL,
    shown TEXT NOT NULL, time TEXT NOT NULL, UNIQUE (rater, task, question)
);
CREATE INDEX tallies ON votes (task, question, answer);
CREATE TABLE undone (
    rater TEXT NOT NULL, task TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, shown TEXT NOT NULL,
    time TEXT NOT NULL, undone TEXT NOT NULL
);
""",
    """
DROP INDEX tallies;
ALTER TABLE study ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
ALTER TABLE folders ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
ALTER TABLE votes ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
CREATE TABLE raters (
    key TEXT PRIMARY KEY, name TEXT NOT NULL, claim TEXT NOT NULL, time TEXT NOT NULL, checksum TEXT NOT NULL
);
""",
)
"""What version 0 consists of, and what each later version changes."""

COLUMNS = {
    "study": ("mode", "digest", "secret"),
    "folders": ("position", "path"),
    "tasks": ("id", "position", "prompt", "seed", "category", "images"),
    "votes": ("rater", "task", "question", "answer", "shown", "time"),
    "raters": ("key", "name", "claim", "time"),
}
"""Of the tables whose rows have a checksum, all but the checksum."""


def name_key(name: str) -> str:
    """The same for names that people take for one: "Ann" is "ann"."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def opaque(secret: str, *parts: object) -> str:
    """A name that tells nothing about its parts to who hasn't got the secret; it's always the same."""
    return hashlib.blake2b(json.dumps(parts).encode(), key=bytes.fromhex(secret), digest_size=12).hexdigest()


def checked(secret: str, table: str, row: Sequence[object]) -> tuple:
    """The row as it is stored, with its checksum."""
    return (*row, opaque(secret, "checksum", table, *row))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def dump(values: Sequence) -> str:
    return json.dumps(values, ensure_ascii=False)


def damaged(path: Path, reason: str) -> UserError:
    reason = "".join(char if char.isprintable() else "?" for char in reason).rstrip(".")
    return UserError(f"{path} is damaged ({reason}); restore it from a backup, or name another --output to begin anew")


def version_of(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator:
    """All that is run inside, or nothing."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection.execute
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
