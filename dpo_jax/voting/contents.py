"""The contents of a file of votes. Every row is checked before it is used."""

import collections
import math
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple

import pydantic
from typing_extensions import TypedDict

from dpo_jax.errors import UserError
from dpo_jax.files import conform, parse_json
from dpo_jax.voting.schema import COLUMNS, damaged, opaque, transaction, version_of, with_checksum
from dpo_jax.voting.study import MODES, Answer, Task, TaskImage


class Vote(NamedTuple):
    """A rater's answer to one question about one task."""

    rater: str
    task: str
    question: str
    answer: Answer
    """One number per image, in the order of the task's images."""
    shown: tuple[int, ...]
    """The index of the task's image at each place, from left to right."""
    time: str

    @property
    def key(self) -> "Key":
        return self.rater, self.task, self.question


Key = tuple[str, str, str]
"""Rater, task and question."""


class Contents(NamedTuple):
    """Everything in a file of votes."""

    mode: str
    digest: str
    secret: str
    folders: list[Path]
    tasks: dict[str, Task]
    votes: dict[Key, Vote]
    """In chronological order."""
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


def read(path: Path, connection: sqlite3.Connection) -> Contents:
    """Return the contents of the file. Raises UserError with its path if dpo_jax.vote cannot have written a row."""
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
            raise UserError(f"table study: unknown mode {study['mode']!r}")
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
    except (UserError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from None


def _rows(connection: sqlite3.Connection, table: str, schema: Any, secret: str | None) -> list[Any]:
    """Return the rows of a table in order. With a secret, also verify their checksums."""
    columns = COLUMNS[table]
    order = "position" if "position" in columns else "rowid"
    chosen = ", ".join(columns) + (", checksum" if secret is not None else "")
    found = connection.execute(f"SELECT {chosen} FROM {table} ORDER BY {order}").fetchall()
    rows = conform([dict(zip(columns, row, strict=False)) for row in found], schema, f"table {table}")
    if table == "study" and len(rows) != 1:
        raise UserError(f"table study has {len(rows)} rows, not 1")
    for number, row in enumerate(found, 1):
        if secret is not None and row != with_checksum(secret, table, row[:-1]):
            raise UserError(f"table {table}, row {number} differs from its checksum")
    return rows


def _folder(row: _Folder, position: int) -> Path:
    path = row["path"]
    if row["position"] != position or not os.path.isabs(path) or os.path.normpath(path) != path:
        raise UserError(f"table folders: {path!r} is not the path of a folder")
    return Path(path)


def _tasks(rows: Sequence[_Task], secret: str, folders: int) -> dict[str, Task]:
    images = [parse_json(row["images"], f"table tasks, row {number}") for number, row in enumerate(rows, 1)]
    images = conform(images, list[list[tuple[int, str]]], "table tasks, images", strict=False)
    tasks = {}
    for position, (row, named) in enumerate(zip(rows, images, strict=True)):
        where = f"table tasks, row {position + 1}"
        if row["position"] != position or row["id"] != opaque(secret, "task", position):
            raise UserError(f"{where}: wrong id or position")
        for folder, name in named:
            if not 0 <= folder < folders or PurePath(name).name != name or name in ("", "..") or "\0" in name:
                raise UserError(f"{where}: {name!r} is not the name of an image in one of {folders} folders")
        if not named:
            raise UserError(f"{where}: no images")
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
            raise UserError(f"{where}: unknown task {row['task']!r}")
        places = len(tasks[row["task"]].images)
        if len(answer) != places or not all(map(math.isfinite, answer)) or not MODES[mode].is_answer(answer):
            raise UserError(f"{where}: {row['answer']} is not an answer of --mode={mode}")
        if sorted(shown) != list(range(places)):
            raise UserError(f"{where}: {row['shown']} is not an order of {places} images")
        vote = Vote(row["rater"], row["task"], row["question"], answer, shown, row["time"])
        votes[vote.key] = vote
    return votes
