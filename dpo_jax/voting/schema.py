"""The tables of a file of votes (SQLite).

Table `votes` has one row per vote: rater, task, question, answer (JSON numbers, one per image of the task, in the order
of `tasks.images`), shown (JSON: the index of the image at each place, from left to right) and time (UTC). Rater, task
and question together are unique. `undone` holds the votes that raters took back, and `raters` their names. `tasks` and
`folders` describe what was shown, so that the file can be exported on its own.

SQLite detects damage to its own structures only. Every row therefore has a checksum, keyed with the file's secret.
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
"""The statements that create version 0, and those that change it to each later version."""

COLUMNS = {
    "study": ("mode", "digest", "secret"),
    "folders": ("position", "path"),
    "tasks": ("id", "position", "prompt", "seed", "category", "images"),
    "votes": ("rater", "task", "question", "answer", "shown", "time"),
    "raters": ("key", "name", "claim", "time"),
}
"""The columns of the tables whose rows have a checksum, without the checksum."""


def name_key(name: str) -> str:
    """Return a key that is equal for names that people confuse, such as "Ann" and "ann"."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def opaque(secret: str, *parts: object) -> str:
    """Return an id that is always the same for these parts and reveals nothing about them without the secret."""
    return hashlib.blake2b(json.dumps(parts).encode(), key=bytes.fromhex(secret), digest_size=12).hexdigest()


def with_checksum(secret: str, table: str, row: Sequence[object]) -> tuple:
    """Return the row with its checksum, as it is stored."""
    return (*row, opaque(secret, "checksum", table, *row))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def dump(values: Sequence) -> str:
    return json.dumps(values, ensure_ascii=False)


def damaged(path: Path, reason: str) -> UserError:
    """Return the error for a damaged file of votes."""
    reason = "".join(char if char.isprintable() else "?" for char in reason).rstrip(".")
    return UserError(f"{path} is damaged ({reason}); restore it from a backup, or set another --output to start over")


def version_of(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator:
    """Commit everything that is run inside the block, or nothing if the block fails."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection.execute
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
