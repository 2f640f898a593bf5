"""Votes in an SQLite file. An acknowledged vote is on disk, whatever happens to the process.

The contents of the file are kept in memory, so that finding the next question takes as long after 20,000 votes as at
first.
"""

import collections
import hmac
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.voting.contents import Contents, Vote, read
from dpo_jax.voting.schema import COLUMNS, VERSION, dump, name_key, now, opaque, transaction, version_of, with_checksum
from dpo_jax.voting.study import MODES, Answer, Folder, Mode, TaskImage, study_digest
from dpo_jax.voting.votes_file import check_file, create, make_durable, open_connection, store_folder_paths, upgrade

MAX_UNDOS = 10
"""How often a rater may undo the answer to one question about one task."""

Tallies = Mapping[tuple[str, str], Mapping[Answer, int]]
"""The number of votes for each answer, by task and question."""


class Store:
    """An open file of votes. Several threads and several processes can use it at once.

    Attributes:
        path: of the file.
        mode: a name in MODES.
        folders: the folders of images.
        tasks: the tasks by their opaque id, in order.
        digests: SHA-256 of each image file, if the file of votes was opened together with the folders.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self._changes = path, 0
        self.digests: dict[TaskImage, str] = {}
        self._connection, self._lock = connection, threading.Lock()
        self._read()

    def _read(self) -> None:
        others = self._version_of_others()  # before reading: a change in between causes another read
        contents: Contents = read(self.path, self._connection)
        self.mode, self.digest, self._secret = contents.mode, contents.digest, contents.secret
        self.folders, self.tasks = contents.folders, contents.tasks
        self._votes, self._undone, self._raters = contents.votes, contents.undone, contents.raters
        self._answered: dict[str, dict[tuple[str, str], None]] = {}
        self._tallies: dict[tuple[str, str], collections.Counter[Answer]] = {}
        for vote in self._votes.values():
            self._count(vote, 1)
        self._others = others

    @property
    def rules(self) -> Mode:
        """The mode of the study."""
        return MODES[self.mode]

    @property
    def revision(self) -> int:
        """A number that differs after every change."""
        with self._reading():
            return self._changes

    def opaque(self, *parts: object) -> str:
        """Return an id that is always the same for these parts and reveals nothing about them without the file."""
        return opaque(self._secret, *parts)

    def add(self, rater: str, task: str, question: str, answer: Answer, shown: Sequence[int]) -> Vote:
        """Store a vote durably, unless this rater has already answered, and return the stored vote."""
        vote = Vote(rater, task, question, tuple(answer), tuple(shown), now())
        with self._changing() as run:
            if vote.key in self._votes:
                return self._votes[vote.key]
            row = rater, task, question, dump(vote.answer), dump(vote.shown), vote.time
            run("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", with_checksum(self._secret, "votes", row))
            self._connection.execute("COMMIT")
            self._votes[vote.key] = vote
            self._count(vote, 1)
        return vote

    def undo(self, rater: str, task: str, question: str) -> bool:
        """Move a vote to the table `undone`. Return False if there is no such vote.

        Raises UserError if it is not the rater's latest vote, or was undone too often.
        """
        key = rater, task, question
        with self._changing() as run:
            if key not in self._votes:
                return False
            if key[1:] != next(reversed(self._answered[rater])):
                raise UserError("you can only undo your latest answer")
            if self._undone[key] >= MAX_UNDOS:
                raise UserError(f"you have undone this answer {MAX_UNDOS} times, so it is final now")
            where = "rater = ? AND task = ? AND question = ?"
            columns = ", ".join(COLUMNS["votes"])
            run(f"INSERT INTO undone SELECT {columns}, ? FROM votes WHERE {where}", (now(), *key))
            run(f"DELETE FROM votes WHERE {where}", key)
            self._connection.execute("COMMIT")
            self._undone[key] += 1
            self._count(self._votes.pop(key), -1)
        return True

    def join(self, name: str, claim: str) -> bool:
        """Register a name with a secret claim. Return False if the name is registered with another claim."""
        with self._changing() as run:
            key = name_key(name)
            if key not in self._raters:
                row = with_checksum(self._secret, "raters", (key, name, claim, now()))
                run("INSERT INTO raters VALUES (?, ?, ?, ?, ?)", row)
                self._connection.execute("COMMIT")
                self._raters[key] = name, claim
            taken_by, known = self._raters[key]
            return hmac.compare_digest(claim, known) and taken_by == name

    def name_of(self, name: str) -> str | None:
        """Return how its rater wrote this name, or a name that people confuse with it; None if nobody has taken it."""
        with self._reading():
            return self._raters.get(name_key(name), (None, ""))[0]

    def votes(self) -> list[Vote]:
        """Return all votes in chronological order."""
        with self._reading():
            return list(self._votes.values())

    def answered(self, rater: str) -> list[tuple[str, str]]:
        """Return the tasks and questions that a rater has answered, the latest last."""
        with self._reading():
            return list(self._answered.get(rater, ()))

    def tallies(self) -> Tallies:
        """Return the number of votes for each answer. The result is not to be changed."""
        with self._reading():
            return self._tallies

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _count(self, vote: Vote, change: int) -> None:
        key = vote.task, vote.question
        tally = collections.Counter(self._tallies.get(key))  # a new one: other threads may be reading the old one
        tally[vote.answer] += change
        self._changes += 1
        self._tallies[key] = +tally
        if change > 0:
            self._answered.setdefault(vote.rater, {})[key] = None
        else:
            del self._answered[vote.rater][key]

    def _version_of_others(self) -> int:
        """Return a number that differs after another connection has changed the file."""
        return self._connection.execute("PRAGMA data_version").fetchone()[0]

    def _refresh(self) -> None:
        if self._version_of_others() != self._others:
            try:
                self._read()
            except UserError as error:  # the file was damaged meanwhile
                raise sqlite3.DatabaseError(str(error)) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            self._refresh()
            yield

    @contextmanager
    def _changing(self) -> Iterator:
        """Lock the file against changes by others; roll back what the block does not commit."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                while self._version_of_others() != self._others:
                    self._connection.execute("ROLLBACK")
                    self._refresh()
                    self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection.execute
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")


def open_study(path: Path, mode: str, folders: Sequence[Folder]) -> Store:
    """Open the file of votes on these folders, or create it.

    Raises UserError if the folders give no task, if the file is damaged, or if it has votes on other images.
    """
    tasks, digest, paths = MODES[mode].tasks(folders), study_digest(mode, folders), [folder.path for folder in folders]
    if not path.parent.is_dir():
        raise MissingFileError(f"{path.parent} is not a folder; create it, or set another --output")
    try:
        check_file(path)
    except FileNotFoundError:
        create(path, mode, digest, secrets.token_hex(), paths, tasks)
    with open_connection(path) as connection:
        found = read(path, connection)
        if found.mode != mode:
            raise UserError(f"{path} has votes of --mode={found.mode}, not {mode}; set another --output for {mode}")
        if found.digest != digest or list(found.tasks.values()) != tasks:
            raise UserError(
                f"{path} has votes on other images, or on the same folders in another order; set another --output"
            )
        make_durable(connection)
        if version_of(connection) < VERSION:
            upgrade(connection)
        with transaction(connection) as run:
            store_folder_paths(run, found.secret, paths)
        store = Store(path, connection)
        for position, folder in enumerate(folders):
            for entry, digest in zip(folder.entries, folder.digests, strict=True):
                store.digests[TaskImage(position, entry.image)] = digest
        return store


def open_votes(path: Path) -> Store:
    """Open an existing file of votes. Its images need not exist.

    Raises MissingFileError or UserError if there is no file of votes at `path`, or if it is damaged.
    """
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist; run dpo_jax.vote with --images=DIR_A,DIR_B to create it, and vote"
        )
    with open_connection(path) as connection:
        return Store(path, connection)
