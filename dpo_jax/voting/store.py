"""Votes in an SQLite file. A vote that was acknowledged is on the disk, whatever happens to the process.

Table `votes` has a row for each: rater, task, question, answer (JSON numbers, one for each image of the task, in the
order of `tasks.images`), shown (JSON: which image stood at each place, from left to right) and time (UTC). Rater, task
and question are unique. What a rater took back is in `undone`. `tasks` and `folders` say what was shown, so that the
file can be exported by itself.
"""

import collections
import datetime
import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dpo_jax.voting.study import MODES, Answer, Folder, Mode, Task, TaskImage, study_digest

APPLICATION_ID = 0x64706F76  # "dpov"; SQLite keeps it in the file's header
SCHEMA = """
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
"""


class Vote(NamedTuple):
    rater: str
    task: str
    question: str
    answer: Answer
    """In the order of the task's images."""
    shown: tuple[int, ...]
    """Which of the task's images stood at each place."""
    time: str


Tallies = dict[tuple[str, str], collections.Counter[Answer]]
"""How often each answer was given, by task and question."""


class Store:
    """An open file of votes. Safe to use from several threads, and several processes.

    Attributes:
        mode: name in MODES.
        folders: where the images are.
        tasks: by their opaque id, in order.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._connection, self._lock = connection, threading.Lock()
        ((self.mode, self.digest, self._secret),) = connection.execute("SELECT mode, digest, secret FROM study")
        self.folders = [Path(row[0]) for row in connection.execute("SELECT path FROM folders ORDER BY position")]
        rows = connection.execute("SELECT id, prompt, seed, category, images FROM tasks ORDER BY position")
        self.tasks = {
            id: Task(prompt, seed, category, tuple(TaskImage(*image) for image in json.loads(images)))
            for id, prompt, seed, category, images in rows
        }

    @property
    def how(self) -> Mode:
        return MODES[self.mode]

    def opaque(self, *parts: object) -> str:
        """A name that tells nothing about its parts to who hasn't got the file; it's always the same."""
        return _opaque(self._secret, *parts)

    def add(self, rater: str, task: str, question: str, answer: Answer, shown: Sequence[int]) -> Vote:
        """Stores a vote durably, unless this rater has voted on it before; returns the vote that is stored."""
        row = rater, task, question, _dump(answer), _dump(shown), _now()
        with self._transaction() as run:
            run("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            where = "rater = ? AND task = ? AND question = ?"
            (stored,) = run(f"SELECT {_COLUMNS} FROM votes WHERE {where}", row[:3])
        return _vote(stored)

    def undo(self, rater: str, task: str, question: str) -> bool:
        """Takes a vote back and keeps it in `undone`; False if there is none."""
        where = "rater = ? AND task = ? AND question = ?"
        with self._transaction() as run:
            key = rater, task, question
            run(f"INSERT INTO undone SELECT {_COLUMNS}, ? FROM votes WHERE {where}", (_now(), *key))
            return run(f"DELETE FROM votes WHERE {where}", key).rowcount > 0

    def votes(self) -> list[Vote]:
        """In the order in which they were given."""
        return [_vote(row) for row in self._read(f"SELECT {_COLUMNS} FROM votes ORDER BY rowid")]

    def answered(self, rater: str) -> list[tuple[str, str]]:
        """Tasks and questions that a rater has answered, the latest last."""
        return self._read("SELECT task, question FROM votes WHERE rater = ? ORDER BY rowid", (rater,))

    def tallies(self) -> Tallies:
        counts: Tallies = collections.defaultdict(collections.Counter)
        rows = self._read("SELECT task, question, answer, COUNT(*) FROM votes GROUP BY task, question, answer")
        for task, question, answer, count in rows:
            counts[task, question][tuple(json.loads(answer))] = count
        return counts

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, query: str, values: Sequence[object] = ()) -> list[tuple]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator:
        with self._lock, _transaction(self._connection) as run:
            yield run


def open_study(path: Path, mode: str, folders: Sequence[Folder]) -> Store:
    """Opens the file of votes on these folders, or begins one.

    Raises:
        ValueError: the folders make up no task, or the file holds something else, such as votes on other folders.
    """
    tasks, digest = MODES[mode].tasks(folders), study_digest(mode, folders)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to")
    with _opening(path) as connection:
        with _transaction(connection) as run:
            if run("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
                _begin(run, mode, digest, tasks)
            _check(connection, path)
            ((found_mode, found),) = run("SELECT mode, digest FROM study")
            if found_mode != mode:
                raise ValueError(f"{path} holds answers of --mode={found_mode}; take another --output for {mode}")
            if found != digest:
                raise ValueError(f"{path} holds votes on other images, or in another order; take another --output")
            for position, folder in enumerate(folders):
                run("INSERT OR REPLACE INTO folders VALUES (?, ?)", (position, str(folder.path.resolve())))
        return Store(path, connection)


def open_votes(path: Path) -> Store:
    """Opens a file of votes that exists, wherever its images are.

    Raises FileNotFoundError or ValueError for files that aren't one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of votes at {path}; --images=DIR_A,DIR_B begins one")
    with _opening(path) as connection:
        _check(connection, path)
        return Store(path, connection)


@contextmanager
def _opening(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that's closed if opening fails, with SQLite's errors in a sentence."""
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")  # readers never wait for writers
        connection.execute("PRAGMA synchronous = FULL")  # a commit returns once it's on the disk
        yield connection
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise ValueError(f"{path} can't be opened as a file of votes: {error}") from error
        raise


def _check(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise ValueError(f"{path} is no file of votes; dpo_jax.vote has not written it")


def _begin(run, mode: str, digest: str, tasks: Sequence[Task]) -> None:
    for statement in filter(str.strip, SCHEMA.split(";")):
        run(statement)
    run(f"PRAGMA application_id = {APPLICATION_ID}")
    secret = secrets.token_hex()
    run("INSERT INTO study VALUES (?, ?, ?)", (mode, digest, secret))
    for position, task in enumerate(tasks):
        row = position, task.prompt, task.seed, task.category, _dump(task.images)
        run("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?)", (_opaque(secret, "task", position), *row))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator:
    """All that is run inside, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection.execute
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


_COLUMNS = ", ".join(Vote._fields)


def _vote(row: tuple) -> Vote:
    rater, task, question, answer, shown, time = row
    return Vote(rater, task, question, tuple(json.loads(answer)), tuple(json.loads(shown)), time)


def _dump(values: Sequence) -> str:
    return json.dumps(values, ensure_ascii=False)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _opaque(secret: str, *parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), key=bytes.fromhex(secret), digest_size=12).hexdigest()
