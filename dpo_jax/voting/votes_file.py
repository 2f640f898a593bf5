"""The SQLite file of votes: how it is begun, and what is checked before anything in it is believed.

Table `votes` has a row for each vote: rater, task, question, answer (JSON numbers, one for each image of the task, in
the order of `tasks.images`), shown (JSON: which image stood at each place, from left to right) and time (UTC). Rater,
task and question are unique. What a rater took back is in `undone`, and who may vote is in `raters`. `tasks` and
`folders` say what was shown, so that the file can be exported by itself.

SQLite notices damage to its own structures only. Rows therefore carry a checksum, keyed with the file's secret.
"""

import collections
import datetime
import hashlib
import json
import math
import os
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple

import pydantic
from typing_extensions import TypedDict

from dpo_jax.files import check_regular, conform, look_at, parse_json, partial_name, sync
from dpo_jax.voting.study import MODES, Answer, Task, TaskImage

APPLICATION_ID = 0x64706F76  # "dpov"; SQLite keeps it in the file's header
VERSION = 1
MAX_BYTES = 2**30
"""A file of 20,000 votes has some 10 MB."""
MAX_VALUE = 2**20
"""Bytes of a text in a row."""
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


class Vote(NamedTuple):
    rater: str
    task: str
    question: str
    answer: Answer
    """In the order of the task's images."""
    shown: tuple[int, ...]
    """Which of the task's images stood at each place."""
    time: str

    @property
    def key(self) -> "Key":
        return self.rater, self.task, self.question


Key = tuple[str, str, str]
"""Rater, task and question."""


class Contents(NamedTuple):
    """All of a file of votes."""

    mode: str
    digest: str
    secret: str
    folders: list[Path]
    tasks: dict[str, Task]
    votes: dict[Key, Vote]
    """In the order in which they were given."""
    undone: collections.Counter[Key]
    raters: dict[str, tuple[str, str]]
    """(name, claim) by `name_key`."""


class _Study(TypedDict):
    mode: str
    digest: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
    secret: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class _Folder(TypedDict):
    position: int
    path: str


class _Task(TypedDict):
    id: str
    position: int
    prompt: str
    seed: int | None
    category: str
    images: str


class _Vote(TypedDict):
    rater: str
    task: str
    question: str
    answer: str
    shown: str
    time: str


class _Rater(TypedDict):
    key: str
    name: str
    claim: str
    time: str


def name_key(name: str) -> str:
    """The same for names that people take for one: "Ann" is "ann"."""
    return unicodedata.normalize("NFKC", name).casefold()


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


# ---- before SQLite sees the file


def check_file(path: Path) -> None:
    """Raises FileNotFoundError or ValueError where there can't be a file of votes at `path`.

    SQLite follows links, begins an empty file anew, drops a log (-wal) without its file, and deletes what a journal of
    someone else's names.
    """
    wal, shm, journal = (path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))
    for file in (path, wal, shm, journal):
        if file.is_symlink():
            raise ValueError(f"{file} is a symbolic link, which is not followed; name the file itself")
    for file in (wal, shm):
        if file.exists():
            check_regular(file)
    if journal.exists():
        raise ValueError(
            f"{journal} is not from dpo_jax.vote: another program left a change unfinished. Restore {path.name} from "
            f"a backup and remove {journal.name}"
        )
    if not path.exists() and wal.exists() and wal.stat().st_size:
        raise ValueError(
            f"{path} is missing, but {wal.name} beside it may hold votes; restore {path.name}, or remove {wal.name} "
            "to begin anew"
        )
    check_regular(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(
            f"{path} is empty (0 bytes), so whatever votes it held are lost; restore it from a backup, or remove it to "
            "begin anew"
        )
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a file of votes has at most {MAX_BYTES:,}")
    kind = look_at(path)
    if kind != "an SQLite database":
        raise ValueError(f"{path} is not a file of votes, but {kind or 'something else'}; name another --output")


def damaged(path: Path, reason: str) -> ValueError:
    reason = "".join(char if char.isprintable() else "?" for char in reason).rstrip(".")
    return ValueError(f"{path} is damaged ({reason}); restore it from a backup, or name another --output to begin anew")


# ---- opening


@contextmanager
def opening(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a file of votes of any version, which is closed if the block fails; errors are in a sentence."""
    check_file(path)
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
        connection.execute("PRAGMA trusted_schema = OFF")
        _check_kind(path, connection)
        yield connection
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise _in_a_sentence(path, error) from error
        if isinstance(error, UnicodeDecodeError):  # SQLite's message quotes what is damaged
            raise damaged(path, str(error)) from error
        raise


def _in_a_sentence(path: Path, error: sqlite3.Error) -> ValueError:
    if "locked" in str(error):
        return ValueError(f"{path} is in use by another program ({error}); stop it and try again")
    is_environment = isinstance(error, sqlite3.OperationalError) and "decode" not in str(error)
    if is_environment and "no such" not in str(error):
        return ValueError(f"{path} can't be opened ({error}); check its permissions, its folder's, and free space")
    return damaged(path, str(error))


def _check_kind(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise ValueError(f"{path} is an SQLite file of another program, not a file of votes; name another --output")
    version = version_of(connection)
    if not 0 <= version <= VERSION:
        raise ValueError(f"{path} has version {version}, which this dpo_jax does not know; update dpo_jax")
    ((verdict,),) = connection.execute("PRAGMA integrity_check(1)")
    if verdict != "ok":
        raise damaged(path, str(verdict).splitlines()[-1])
    with sqlite3.connect(":memory:") as ours:
        ours.executescript("".join(SCHEMAS[: version + 1]))
        is_ours = _structure(connection) == _structure(ours)
    ours.close()
    if not is_ours:
        raise damaged(path, "its tables are not those that dpo_jax.vote makes")


def _structure(connection: sqlite3.Connection) -> list[tuple]:
    """Tables with their columns, indices, triggers and views."""
    objects = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
    structure: list[tuple] = []
    for kind, name, table, sql in objects:
        is_virtual = str(sql).upper().startswith("CREATE VIRTUAL")
        structure.append((kind, name, table, is_virtual))
        if kind == "table" and not is_virtual:
            structure += connection.execute("SELECT * FROM pragma_table_xinfo(?)", (name,))
    return structure


def version_of(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


# ---- reading


def read(path: Path, connection: sqlite3.Connection) -> Contents:
    """All that the file holds. Raises ValueError, naming the file, for rows that dpo_jax.vote can't have written."""
    has_checksums = version_of(connection) > 0
    try:
        with transaction(connection, "DEFERRED"):
            (study,) = _rows(connection, "study", list[_Study], None)
            secret = study["secret"] if has_checksums else None
            if secret is not None:
                _rows(connection, "study", list[_Study], secret)
            folders = _rows(connection, "folders", list[_Folder], secret)
            tasks = _rows(connection, "tasks", list[_Task], secret)
            votes = _rows(connection, "votes", list[_Vote], secret)
            raters = _rows(connection, "raters", list[_Rater], secret) if has_checksums else []
            undone = connection.execute("SELECT rater, task, question FROM undone").fetchall()
        if study["mode"] not in MODES:
            raise ValueError(f"table study: unknown mode {study['mode']!r}")
        read_tasks = _tasks(tasks, study["secret"], len(folders))
        return Contents(
            mode=study["mode"],
            digest=study["digest"],
            secret=study["secret"],
            folders=[_folder(row, position) for position, row in enumerate(folders)],
            tasks=read_tasks,
            votes=_votes(votes, study["mode"], read_tasks),
            undone=collections.Counter(conform(undone, list[Key], "table undone")),
            raters={row["key"]: (row["name"], row["claim"]) for row in raters},
        )
    except ValueError as error:
        raise damaged(path, str(error)) from None


def _rows(connection: sqlite3.Connection, table: str, schema: Any, secret: str | None) -> list[Any]:
    """The rows of a table, in order. Checksums are compared if there is a secret."""
    columns = COLUMNS[table]
    order = "position" if "position" in columns else "rowid"
    chosen = ", ".join(columns) + (", checksum" if secret is not None else "")
    found = connection.execute(f"SELECT {chosen} FROM {table} ORDER BY {order}").fetchall()
    rows = conform([dict(zip(columns, row, strict=False)) for row in found], schema, f"table {table}")
    if table == "study" and len(rows) != 1:
        raise ValueError(f"table study has {len(rows)} rows, not 1")
    for number, row in enumerate(found, 1):
        if secret is not None and row != checked(secret, table, row[:-1]):
            raise ValueError(f"table {table}, row {number} is not as it was written")
    return rows


def _folder(row: _Folder, position: int) -> Path:
    path = row["path"]
    if row["position"] != position or not os.path.isabs(path) or os.path.normpath(path) != path:
        raise ValueError(f"table folders: {path!r} is not the path of a folder")
    return Path(path)


def _tasks(rows: Sequence[_Task], secret: str, folders: int) -> dict[str, Task]:
    images = [parse_json(row["images"], f"table tasks, row {number}") for number, row in enumerate(rows, 1)]
    images = conform(images, list[list[tuple[int, str]]], "table tasks, images", strict=False)
    tasks = {}
    for position, (row, named) in enumerate(zip(rows, images, strict=True)):
        where = f"table tasks, row {position + 1}"
        if row["position"] != position or row["id"] != opaque(secret, "task", position):
            raise ValueError(f"{where}: wrong id or position")
        for folder, name in named:
            if not 0 <= folder < folders or PurePath(name).name != name or name in ("", "..") or "\0" in name:
                raise ValueError(f"{where}: {name!r} is not the name of an image in one of {folders} folders")
        if not named:
            raise ValueError(f"{where}: no images")
        shown = tuple(TaskImage(*image) for image in named)
        tasks[row["id"]] = Task(row["prompt"], row["seed"], row["category"], shown)
    return tasks


def _votes(rows: Sequence[_Vote], mode: str, tasks: dict[str, Task]) -> dict[Key, Vote]:
    columns = [[parse_json(row[name], f"table votes, {name}") for row in rows] for name in ("answer", "shown")]  # type: ignore[literal-required]
    answers: list[list[float]] = conform(columns[0], list[list[int | float]], "table votes, answer")
    orders: list[list[int]] = conform(columns[1], list[list[int]], "table votes, shown")
    votes = {}
    for number, (row, answer, shown) in enumerate(zip(rows, map(tuple, answers), map(tuple, orders), strict=True), 1):
        where = f"table votes, row {number}"
        if row["task"] not in tasks:
            raise ValueError(f"{where}: there is no task {row['task']!r}")
        places = len(tasks[row["task"]].images)
        if len(answer) != places or not all(map(math.isfinite, answer)) or not MODES[mode].is_answer(answer):
            raise ValueError(f"{where}: {row['answer']} is not an answer of --mode={mode}")
        if sorted(shown) != list(range(places)):
            raise ValueError(f"{where}: {row['shown']} is not an order of {places} images")
        vote = Vote(row["rater"], row["task"], row["question"], answer, shown, row["time"])
        votes[vote.key] = vote
    return votes


# ---- writing


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


def durable(connection: sqlite3.Connection) -> None:
    """From now on readers never wait for writers, and a commit returns once it's on the disk.

    And in the file itself: a log that is lost, left behind by a copy or damaged takes no vote with it.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 1")


def begin(path: Path, mode: str, digest: str, secret: str, folders: Sequence[Path], tasks: Sequence[Task]) -> None:
    """Makes a file of votes without votes, whole or not at all; does nothing if there is a file by now."""
    partial = path.with_name(partial_name(path.name))
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # it has the secrets of raters
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = MEMORY")
            with transaction(connection) as run:
                for statement in "".join(SCHEMAS).split(";"):
                    run(statement)
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {VERSION}")
                run("INSERT INTO study VALUES (?, ?, ?, ?)", checked(secret, "study", (mode, digest, secret)))
                place(run, secret, folders)
                for position, task in enumerate(tasks):
                    name = opaque(secret, "task", position)
                    row = name, position, task.prompt, task.seed, task.category, dump(task.images)
                    run("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?)", checked(secret, "tasks", row))
            durable(connection)
        finally:
            connection.close()
        sync(partial)
        try:
            os.link(partial, path)  # unlike renaming, it replaces nothing
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(partial, path)
        sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} can't be written ({reason}); check the folder's permissions and free space"
        ) from error
    finally:
        for end in ("", "-wal", "-shm"):
            partial.with_name(partial.name + end).unlink(missing_ok=True)


def place(run: Callable, secret: str, folders: Sequence[Path]) -> None:
    """Notes, in a transaction, where the folders are now."""
    for position, folder in enumerate(folders):
        row = checked(secret, "folders", (position, str(folder.resolve())))
        run("INSERT OR REPLACE INTO folders VALUES (?, ?, ?)", row)


def upgrade(connection: sqlite3.Connection) -> None:
    """Brings a file of an earlier version up to date: all who have voted keep their names."""
    ((secret,),) = connection.execute("SELECT secret FROM study")
    with transaction(connection) as run:
        if version_of(connection) == VERSION:  # another process was first
            return
        for statement in "".join(SCHEMAS[1:]).split(";"):
            run(statement)
        for table, columns in COLUMNS.items():
            for id, *row in run(f"SELECT rowid, {', '.join(columns)} FROM {table}").fetchall():
                run(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (checked(secret, table, row)[-1], id))
        for (name,) in run("SELECT DISTINCT rater FROM votes").fetchall():
            row = name_key(name), name, "", now()
            run("INSERT INTO raters VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", checked(secret, "raters", row))
        run(f"PRAGMA user_version = {VERSION}")
