"""Votes in an SQLite file. A vote that was acknowledged is on the disk, whatever happens to the process.

What was read from the file is kept in memory, so that asking what is next costs the same at 20,000 votes as at none.
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
from dpo_jax.voting.schema import COLUMNS, VERSION, checked, dump, name_key, now, opaque, transaction, version_of
from dpo_jax.voting.study import MODES, Answer, Folder, Mode, TaskImage, study_digest
from dpo_jax.voting.votes_file import begin, check_file, durable, opening, place, upgrade

MOST_UNDONE = 10
"""Times that a rater may take back an answer to one question about one task."""

Tallies = Mapping[tuple[str, str], Mapping[Answer, int]]
"""How often each answer was given, by task and question."""


class Store:
    """An open file of votes. Safe to use from several threads, and several processes.

    Attributes:
        mode: name in MODES.
        folders: where the images are.
        tasks: by their opaque id, in order.
        digests: SHA-256 of each image's file, where the folders were at hand when the file was opened.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self._changes = path, 0
        self.digests: dict[TaskImage, str] = {}
        self._connection, self._lock = connection, threading.Lock()
        self._read()

    def _read(self) -> None:
        others = self._version_of_others()  # before: what comes between is read once more
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
    def how(self) -> Mode:
        return MODES[self.mode]

    @property
    def revision(self) -> int:
        """Another number after each change."""
        with self._reading():
            return self._changes

    def opaque(self, *parts: object) -> str:
        """A name that tells nothing about its parts to who hasn't got the file; it's always the same."""
        return opaque(self._secret, *parts)

    def add(self, rater: str, task: str, question: str, answer: Answer, shown: Sequence[int]) -> Vote:
        """Stores a vote durably, unless this rater has voted on it before; returns the vote that is stored."""
        vote = Vote(rater, task, question, tuple(answer), tuple(shown), now())
        with self._changing() as run:
            if vote.key in self._votes:
                return self._votes[vote.key]
            row = rater, task, question, dump(vote.answer), dump(vote.shown), vote.time
            run("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", checked(self._secret, "votes", row))
            self._connection.execute("COMMIT")
            self._votes[vote.key] = vote
            self._count(vote, 1)
        return vote

    def undo(self, rater: str, task: str, question: str) -> bool:
        """Takes a vote back and keeps it in `undone`; False if there is none.

        Raises ValueError if that was done too often, or if it isn't the rater's latest.
        """
        key = rater, task, question
        with self._changing() as run:
            if key not in self._votes:
                return False
            if key[1:] != next(reversed(self._answered[rater])):
                raise UserError("only your latest answer can be taken back")
            if self._undone[key] >= MOST_UNDONE:
                raise UserError(f"this answer was taken back {MOST_UNDONE} times already, so now it stays")
            where = "rater = ? AND task = ? AND question = ?"
            columns = ", ".join(COLUMNS["votes"])
            run(f"INSERT INTO undone SELECT {columns}, ? FROM votes WHERE {where}", (now(), *key))
            run(f"DELETE FROM votes WHERE {where}", key)
            self._connection.execute("COMMIT")
            self._undone[key] += 1
            self._count(self._votes.pop(key), -1)
        return True

    def join(self, name: str, claim: str) -> bool:
        """Takes a name for who knows `claim`; False if somebody else has it."""
        with self._changing() as run:
            key = name_key(name)
            if key not in self._raters:
                row = checked(self._secret, "raters", (key, name, claim, now()))
                run("INSERT INTO raters VALUES (?, ?, ?, ?, ?)", row)
                self._connection.execute("COMMIT")
                self._raters[key] = name, claim
            taken_by, known = self._raters[key]
            return hmac.compare_digest(claim, known) and taken_by == name

    def name_of(self, name: str) -> str | None:
        """As the rater wrote it who took this name, or one that people take for it; None if nobody did."""
        with self._reading():
            return self._raters.get(name_key(name), (None, ""))[0]

    def votes(self) -> list[Vote]:
        """In the order in which they were given."""
        with self._reading():
            return list(self._votes.values())

    def answered(self, rater: str) -> list[tuple[str, str]]:
        """Tasks and questions that a rater has answered, the latest last."""
        with self._reading():
            return list(self._answered.get(rater, ()))

    def tallies(self) -> Tallies:
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
        tally = collections.Counter(self._tallies.get(key))  # a new one: others may be looking at the old
        tally[vote.answer] += change
        self._changes += 1
        self._tallies[key] = +tally
        if change > 0:
            self._answered.setdefault(vote.rater, {})[key] = None
        else:
            del self._answered[vote.rater][key]

    def _version_of_others(self) -> int:
        """Changes when another connection has changed the file."""
        return self._connection.execute("PRAGMA data_version").fetchone()[0]

    def _refresh(self) -> None:
        if self._version_of_others() != self._others:
            try:
                self._read()
            except ValueError as error:  # by now it is damaged
                raise sqlite3.DatabaseError(str(error)) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            self._refresh()
            yield

    @contextmanager
    def _changing(self) -> Iterator:
        """Inside nobody else changes the file; what is not committed there is undone."""
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
    """Opens the file of votes on these folders, or begins one.

    Raises:
        ValueError: the folders make up no task, or the file holds something else, such as votes on other folders, or
            is damaged.
    """
    tasks, digest, paths = MODES[mode].tasks(folders), study_digest(mode, folders), [folder.path for folder in folders]
    if not path.parent.is_dir():
        raise MissingFileError(f"{path.parent} is not a folder, so {path.name} can't be written to it")
    try:
        check_file(path)
    except FileNotFoundError:
        begin(path, mode, digest, secrets.token_hex(), paths, tasks)
    with opening(path) as connection:
        found = read(path, connection)
        if found.mode != mode:
            raise UserError(f"{path} holds answers of --mode={found.mode}; name another --output for {mode}")
        if found.digest != digest or list(found.tasks.values()) != tasks:
            raise UserError(f"{path} holds votes on other images, or in another order; name another --output")
        durable(connection)
        if version_of(connection) < VERSION:
            upgrade(connection)
        with transaction(connection) as run:
            place(run, found.secret, paths)
        store = Store(path, connection)
        for position, folder in enumerate(folders):
            for entry, digest in zip(folder.entries, folder.digests, strict=True):
                store.digests[TaskImage(position, entry.image)] = digest
        return store


def open_votes(path: Path) -> Store:
    """Opens a file of votes that exists, wherever its images are.

    Raises FileNotFoundError or ValueError for files that aren't one, or are damaged.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file of votes at {path}; --images=DIR_A,DIR_B begins one")
    with opening(path) as connection:
        return Store(path, connection)
