"""Opening, creating and upgrading files of votes. Other files are refused; every change is complete or not made."""

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
    damaged,
    dump,
    name_key,
    now,
    opaque,
    transaction,
    version_of,
    with_checksum,
)
from dpo_jax.voting.study import Task

MAX_BYTES = 2**30
"""A file of 20,000 votes has about 10 MB."""
MAX_VALUE = 2**20
"""The largest text in a row, in bytes."""


def check_file(path: Path) -> None:
    """Raise MissingFileError or UserError if `path` cannot be a file of votes.

    SQLite itself would follow links, start over with an empty file, discard a log (-wal) without its file, and delete
    files that a foreign journal names.
    """
    wal, shm, journal = (path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))
    for file in (path, wal, shm, journal):
        if file.is_symlink():
            raise UserError(
                f"{file} is a symbolic link, which dpo_jax.vote does not follow; set --output to the file itself"
            )
    for file in (wal, shm):
        if file.exists():
            check_regular(file)
    if journal.exists():
        raise UserError(
            f"{journal} is not from dpo_jax.vote: another program did not finish a change. Restore {path.name} from a "
            f"backup and remove {journal.name}"
        )
    if not path.exists() and wal.exists() and wal.stat().st_size:
        raise UserError(
            f"{path} is missing, but {wal.name} beside it may hold votes; restore {path.name}, or remove {wal.name} "
            "to start over"
        )
    check_regular(path)
    size = path.stat().st_size
    if size == 0:
        raise UserError(
            f"{path} is empty (0 bytes), so votes in it are lost; restore it from a backup, or remove it to start over"
        )
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a file of votes has at most {MAX_BYTES:,}")
    kind = look_at(path)
    if kind != "an SQLite database":
        raise UserError(f"{path} is not a file of votes, but {kind or 'something else'}; set another --output")


@contextmanager
def open_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a connection to a file of votes. It is closed if the block fails, and SQLite errors become UserErrors."""
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
            raise _user_error(path, error) from error
        if isinstance(error, UnicodeDecodeError):  # its message quotes the damaged text
            raise damaged(path, str(error)) from error
        raise


def _user_error(path: Path, error: sqlite3.Error) -> UserError:
    if "locked" in str(error):
        return UserError(f"{path} is in use by another program ({error}); stop that program and try again")
    is_environment = isinstance(error, sqlite3.OperationalError) and "decode" not in str(error)
    if is_environment and "no such" not in str(error):
        return UserError(f"{path} cannot be opened ({error}); check permissions of file and folder, and free space")
    return damaged(path, str(error))


def _check_kind(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise UserError(f"{path} is an SQLite file of another program, not a file of votes; set another --output")
    version = version_of(connection)
    if not 0 <= version <= VERSION:
        raise UserError(f"{path} has version {version}, which is newer than this dpo_jax; update dpo_jax")
    ((verdict,),) = connection.execute("PRAGMA integrity_check(1)")
    if verdict != "ok":
        raise damaged(path, str(verdict).splitlines()[-1])
    with sqlite3.connect(":memory:") as ours:
        ours.executescript("".join(SCHEMAS[: version + 1]))
        is_ours = _structure(connection) == _structure(ours)
    ours.close()
    if not is_ours:
        raise damaged(path, "its tables are not those of dpo_jax.vote")


def _structure(connection: sqlite3.Connection) -> list[tuple]:
    """Return all tables with their columns, indices, triggers and views."""
    objects = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
    structure: list[tuple] = []
    for kind, name, table, sql in objects:
        is_virtual = str(sql).upper().startswith("CREATE VIRTUAL")
        structure.append((kind, name, table, is_virtual))
        if kind == "table" and not is_virtual:
            structure += connection.execute("SELECT * FROM pragma_table_xinfo(?)", (name,))
    return structure


def make_durable(connection: sqlite3.Connection) -> None:
    """Make readers never wait for writers, and commits return only when they are on disk, in the file itself.

    No vote is lost with a log (-wal) that is damaged or left out of a copy.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 1")


def create(path: Path, mode: str, digest: str, secret: str, folders: Sequence[Path], tasks: Sequence[Task]) -> None:
    """Create a file without votes, completely or not at all. Do nothing if the file exists by now."""
    partial = path.with_name(partial_name(path.name))
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # it contains the secrets of raters
        connection = sqlite3.connect(partial, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = MEMORY")
            with transaction(connection) as run:
                for statement in "".join(SCHEMAS).split(";"):
                    run(statement)
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {VERSION}")
                run("INSERT INTO study VALUES (?, ?, ?, ?)", with_checksum(secret, "study", (mode, digest, secret)))
                store_folder_paths(run, secret, folders)
                for position, task in enumerate(tasks):
                    name = opaque(secret, "task", position)
                    row = name, position, task.prompt, task.seed, task.category, dump(task.images)
                    run("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?)", with_checksum(secret, "tasks", row))
            make_durable(connection)
        finally:
            connection.close()
        sync(partial)
        try:
            os.link(partial, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(partial, path)
        sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be written ({reason}); check the permissions of its folder and free space"
        ) from error
    finally:
        for end in ("", "-wal", "-shm"):
            partial.with_name(partial.name + end).unlink(missing_ok=True)


def store_folder_paths(run: Callable, secret: str, folders: Sequence[Path]) -> None:
    """Store the current paths of the folders, inside a transaction."""
    for position, folder in enumerate(folders):
        row = with_checksum(secret, "folders", (position, str(folder.resolve())))
        run("INSERT OR REPLACE INTO folders VALUES (?, ?, ?)", row)


def upgrade(connection: sqlite3.Connection) -> None:
    """Upgrade a file of an earlier version. Everybody who has voted keeps their name."""
    ((secret,),) = connection.execute("SELECT secret FROM study")
    with transaction(connection) as run:
        if version_of(connection) == VERSION:  # another process was first
            return
        for statement in "".join(SCHEMAS[1:]).split(";"):
            run(statement)
        for table, columns in COLUMNS.items():
            for id, *row in run(f"SELECT rowid, {', '.join(columns)} FROM {table}").fetchall():
                run(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (with_checksum(secret, table, row)[-1], id))
        for (name,) in run("SELECT DISTINCT rater FROM votes").fetchall():
            row = name_key(name), name, "", now()
            run(
                "INSERT INTO raters VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", with_checksum(secret, "raters", row)
            )
        run(f"PRAGMA user_version = {VERSION}")
