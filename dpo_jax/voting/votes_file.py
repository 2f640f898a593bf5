"""How a file of votes is opened, begun and brought up to date: whole or not at all, and nothing that isn't one."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, look_at, partial_name, sync
from dpo_jax.voting.schema import (
    APPLICATION_ID,
    COLUMNS,
    SCHEMAS,
    VERSION,
    checked,
    damaged,
    dump,
    name_key,
    now,
    opaque,
    transaction,
    version_of,
)
from dpo_jax.voting.study import Task

MAX_BYTES = 2**30
"""A file of 20,000 votes has some 10 MB."""
MAX_VALUE = 2**20
"""Bytes of a text in a row."""


def check_file(path: Path) -> None:
    """Raises FileNotFoundError or ValueError where there can't be a file of votes at `path`.

    SQLite follows links, begins an empty file anew, drops a log (-wal) without its file, and deletes what a journal of
    someone else's names.
    """
    wal, shm, journal = (path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))
    for file in (path, wal, shm, journal):
        if file.is_symlink():
            raise UserError(f"{file} is a symbolic link, which is not followed; name the file itself")
    for file in (wal, shm):
        if file.exists():
            check_regular(file)
    if journal.exists():
        raise UserError(
            f"{journal} is not from dpo_jax.vote: another program left a change unfinished. Restore {path.name} from "
            f"a backup and remove {journal.name}"
        )
    if not path.exists() and wal.exists() and wal.stat().st_size:
        raise UserError(
            f"{path} is missing, but {wal.name} beside it may hold votes; restore {path.name}, or remove {wal.name} "
            "to begin anew"
        )
    check_regular(path)
    size = path.stat().st_size
    if size == 0:
        raise UserError(
            f"{path} is empty (0 bytes), so whatever votes it held are lost; restore it from a backup, or remove it to "
            "begin anew"
        )
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a file of votes has at most {MAX_BYTES:,}")
    kind = look_at(path)
    if kind != "an SQLite database":
        raise UserError(f"{path} is not a file of votes, but {kind or 'something else'}; name another --output")


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


def _in_a_sentence(path: Path, error: sqlite3.Error) -> UserError:
    if "locked" in str(error):
        return UserError(f"{path} is in use by another program ({error}); stop it and try again")
    is_environment = isinstance(error, sqlite3.OperationalError) and "decode" not in str(error)
    if is_environment and "no such" not in str(error):
        return UserError(f"{path} can't be opened ({error}); check its permissions, its folder's, and free space")
    return damaged(path, str(error))


def _check_kind(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise UserError(f"{path} is an SQLite file of another program, not a file of votes; name another --output")
    version = version_of(connection)
    if not 0 <= version <= VERSION:
        raise UserError(f"{path} has version {version}, which this dpo_jax does not know; update dpo_jax")
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
        raise UserError(f"{path} can't be written ({reason}); check the folder's permissions and free space") from error
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
