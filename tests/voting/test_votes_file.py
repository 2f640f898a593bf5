"""Files of votes that are damaged, empty, from another program, or of an earlier version."""

import concurrent.futures
import os
import random
import sqlite3

import pytest

from dpo_jax.voting import schema
from dpo_jax.voting.export import export
from dpo_jax.voting.raters import Raters
from dpo_jax.voting.schema import opaque, with_checksum
from dpo_jax.voting.store import open_study, open_votes
from dpo_jax.voting.study import read_folder


@pytest.fixture
def folders(make_folders):
    return [read_folder(path) for path in make_folders("base", "tuned", prompts=4)]


@pytest.fixture
def path(folders, tmp_path):
    """A file with eight votes."""
    path = tmp_path / "votes.sqlite"
    with open_study(path, "pairs", folders) as store:
        for rater in ("ann", "bob"):
            store.join(rater, "claim")
            for number, task in enumerate(store.tasks):
                store.add(rater, task, "preference", (number % 2, 1 - number % 2), [0, 1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "tuned", "votes.sqlite"]
    return path


def _contents(path):
    with open_votes(path) as store:
        return store.mode, store.folders, store.tasks, store.votes(), store._raters, store.digest, store._secret


def _refused(path, folders, match, error=ValueError):
    """Check that both ways to open the file raise one sentence with its path and a remedy, and do not change it."""
    before = path.read_bytes() if path.is_file() else None
    for opened in (lambda: open_study(path, "pairs", folders), lambda: open_votes(path)):
        with pytest.raises(error, match=match) as caught:
            opened()
        message = str(caught.value)
        assert str(path) in message
        assert len(message.splitlines()) == 1
        assert any(word in message for word in ("restore", "set ", "remove", "needed", "update", "has at most"))
    if before is not None:
        assert path.read_bytes() == before


@pytest.mark.parametrize("tries", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_told_or_changes_nothing(path, tries):
    whole, expected, rng, told = path.read_bytes(), _contents(path), random.Random(0), 0
    used = [at for at in range(len(whole)) if whole[at]]
    for _ in range(tries):
        damaged = bytearray(whole)
        damaged[rng.choice(used)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = _contents(path)
        except ValueError as error:
            told, message = told + 1, str(error)
            assert message.startswith(str(path)), message
            assert message.isprintable()
        else:
            assert found == expected
    assert told > tries / 2


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_half_a_file_is_told(path, folders, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    _refused(path, folders, "is damaged|not a file of votes")


def test_an_emptied_file_does_not_begin_anew(path, folders):
    path.write_bytes(b"")
    _refused(path, folders, r"is empty \(0 bytes\), so votes in it are lost; restore it from a backup")
    path.write_bytes(bytes(50_000))
    _refused(path, folders, "is not a file of votes, but nothing but zero bytes")


def test_a_file_that_went_without_its_log_is_missed(path, folders):
    path.with_name("votes.sqlite-wal").write_bytes(b"votes that were not yet in the file")
    path.unlink()
    with pytest.raises(ValueError, match=r"votes.sqlite is missing, but votes.sqlite-wal beside it may hold votes"):
        open_study(path, "pairs", folders)
    assert not path.exists()


def test_the_file_alone_has_all_votes(path, folders, tmp_path):
    copy = tmp_path / "copy.sqlite"
    with open_study(path, "pairs", folders) as store:
        for count, task in enumerate(store.tasks, 1):
            store.add("carl", task, "preference", (1, 0), [0, 1])
            copy.write_bytes(path.read_bytes())
            with open_votes(copy) as copied:
                assert [vote.rater for vote in copied.votes()].count("carl") == count


@pytest.mark.parametrize("name", ["votes.sqlite", "votes.sqlite-wal", "votes.sqlite-shm", "votes.sqlite-journal"])
@pytest.mark.parametrize("is_there", [True, False])
def test_links_are_not_followed(path, folders, tmp_path, name, is_there):
    elsewhere = tmp_path / "elsewhere"
    if is_there:
        elsewhere.write_bytes(path.read_bytes() if name == "votes.sqlite" else b"mine")
    before = elsewhere.read_bytes() if is_there else None
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(elsewhere)
    for opened in (lambda: open_study(path, "pairs", folders), lambda: open_votes(path)):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name} is a symbolic link|does not exist"):
            opened()
    assert (elsewhere.read_bytes() if elsewhere.exists() else None) == before


def test_a_journal_of_somebody_else_is_not_played_back(path, folders):
    path.with_name("votes.sqlite-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7")
    with pytest.raises(ValueError, match="another program did not finish a change"):
        open_study(path, "pairs", folders)
    assert path.with_name("votes.sqlite-journal").exists()


def test_what_is_no_file_of_votes_is_told(path, folders, tmp_path):
    for data, match in (
        (b"not a database, but long enough to look like one" * 100, "is not a file of votes, but something else"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        (b"SQLite format 3\0" + bytes(84), "is damaged|another program"),
        (b"SQLite format 3\0" + random.Random(0).randbytes(9000), "is damaged|another program"),
    ):
        path.write_bytes(data)
        _refused(path, folders, match)
    path.unlink()
    path.mkdir()
    _refused(path, folders, "is a folder, and a file is needed")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        open_study(path, "pairs", folders)
    with pytest.raises(FileNotFoundError, match=r"gone\.sqlite does not exist"):
        open_votes(tmp_path / "gone.sqlite")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; create it"):
        open_study(tmp_path / "nowhere" / "votes.sqlite", "pairs", folders)
    assert not (tmp_path / "gone.sqlite").exists()


def test_a_file_without_end_is_not_read(path, folders):
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes; a file of votes has at most"):
        open_study(path, "pairs", folders)


CHANGES = {
    "another program's": ("PRAGMA application_id = 1", "an SQLite file of another program"),
    "newer": ("PRAGMA user_version = 99", "has version 99, which is newer than this dpo_jax; update"),
    "trigger": ("CREATE TRIGGER t AFTER INSERT ON votes BEGIN DELETE FROM votes; END", "its tables are not those"),
    "view": ("CREATE VIEW v AS SELECT * FROM votes", "its tables are not those of dpo_jax.vote"),
    "table": ("CREATE TABLE mine (x)", "its tables are not those of dpo_jax.vote"),
    "column": ("ALTER TABLE votes ADD COLUMN x", "its tables are not those of dpo_jax.vote"),
    "lost table": ("DROP TABLE undone", "its tables are not those of dpo_jax.vote"),
    "no study": ("DELETE FROM study", "table study has 0 rows, not 1"),
    "two studies": ("INSERT INTO study SELECT * FROM study", "table study has 2 rows, not 1"),
    "lost tasks": ("DELETE FROM tasks WHERE position = 1", "table tasks, row 2: wrong id or position"),
    "answer": ("UPDATE votes SET answer = '[1, 0]' WHERE rowid = 1", "table votes, row 1 differs from its checksum"),
    "rater": ("UPDATE votes SET rater = 'eve' WHERE rowid = 2", "table votes, row 2 differs from its checksum"),
    "prompt": ("UPDATE tasks SET prompt = 'another'", "table tasks, row 1 differs from its checksum"),
    "digest": ("UPDATE study SET digest = replace(digest, substr(digest, 1, 1), 'f')", "differs from its checksum|f0"),
    "blob": ("UPDATE votes SET rater = x'00ff' WHERE rowid = 1", r"table votes: 0\.rater: .* valid string"),
    "foreign text": ("UPDATE votes SET rater = CAST(x'ff41' AS TEXT) WHERE rowid = 1", "is damaged .*UTF-8"),
    "number": ("UPDATE tasks SET seed = 'many' WHERE position = 0", r"table tasks: 0\.seed: .* valid integer"),
    "huge": ("UPDATE votes SET rater = zeroblob(5000000) WHERE rowid = 1", "is damaged .*too big"),
    "secret": ("UPDATE study SET secret = 'none'", r"table study: 0\.secret: "),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_dpo_jax_has_not_written_is_told(path, folders, change):
    statement, match = CHANGES[change]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()
    _refused(path, folders, match)


@pytest.mark.parametrize(
    ("table", "values", "match"),
    [
        ("tasks", {"images": '[[0, "../../secret.png"], [1, "0-0.png"]]'}, "'../../secret.png' is not the name of"),
        ("tasks", {"images": '[[0, "0-0.png"], [7, "0-0.png"]]'}, "is not the name of an image in one of 2 folders"),
        ("tasks", {"images": "[]"}, "table tasks, row 1: no images"),
        ("tasks", {"images": "[[" * 5000}, "not valid JSON"),
        ("folders", {"path": "/tmp/../etc"}, "'/tmp/../etc' is not the path of a folder"),
        ("folders", {"path": "relative"}, "is not the path of a folder"),
        ("votes", {"answer": "[1, 1]"}, r"\[1, 1\] is not an answer of --mode=pairs"),
        ("votes", {"answer": "[NaN, 0]"}, "is not an answer"),
        ("votes", {"answer": '{"a": 1}'}, "table votes, answer: 0"),
        ("votes", {"answer": "[1, 0, 0]"}, "is not an answer"),
        ("votes", {"shown": "[0, 0]"}, "is not an order of 2 images"),
        ("votes", {"task": "gone"}, "unknown task 'gone'"),
        ("study", {"mode": "guess"}, "unknown mode 'guess'"),
    ],
)  # fmt: skip
def test_a_strangers_file_reaches_nothing_outside(path, folders, table, values, match):
    """A malicious file can have valid checksums."""
    connection = sqlite3.connect(path, isolation_level=None)
    ((secret,),) = connection.execute("SELECT secret FROM study")
    columns = schema.COLUMNS[table]
    (row,) = connection.execute(f"SELECT {', '.join(columns)} FROM {table} LIMIT 1")
    row = with_checksum(secret, table, (dict(zip(columns, row, strict=True)) | values).values())
    fields = ", ".join(f"{column} = ?" for column in (*columns, "checksum"))
    connection.execute(f"UPDATE {table} SET {fields} WHERE rowid = (SELECT min(rowid) FROM {table})", row)
    connection.close()
    _refused(path, folders, match)


def test_the_images_of_a_file_are_those_of_the_folders(path, folders):
    """A malicious file can have the right digest, and tasks that show an image with another prompt."""
    connection = sqlite3.connect(path, isolation_level=None)
    ((secret,),) = connection.execute("SELECT secret FROM study")
    row = [opaque(secret, "task", 0), 0, "another prompt", 0, "", '[[0, "0-0.png"], [1, "0-0.png"]]']
    connection.execute("REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?)", with_checksum(secret, "tasks", row))
    connection.close()
    with pytest.raises(ValueError, match="votes on other images"):
        open_study(path, "pairs", folders)


def test_a_file_of_the_version_before_continues(folders, tmp_path):
    path, secret = tmp_path / "old.sqlite", "ab" * 32
    with open_study(tmp_path / "new.sqlite", "pairs", folders) as new:
        digest, tasks = new.digest, list(new.tasks.values())
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(schema.SCHEMAS[0])
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute("INSERT INTO study VALUES ('pairs', ?, ?)", (digest, secret))
    for position, folder in enumerate(folders):
        connection.execute("INSERT INTO folders VALUES (?, ?)", (position, str(folder.path)))
    for position, task in enumerate(tasks):
        row = opaque(secret, "task", position), position, task.prompt, task.seed, task.category
        connection.execute("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?)", (*row, schema.dump(task.images)))
        vote = "Ann", row[0], "preference", "[1, 0]", "[0, 1]", "2026-01-01T00:00:00.000+00:00"
        connection.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", vote)
    connection.close()
    before = path.read_bytes()
    with open_votes(path) as store:
        assert export(store, tmp_path / "votes.jsonl") == (4, 0)
    assert path.read_bytes() == before  # reading changes nothing
    for _ in range(2):
        with open_study(path, "pairs", folders) as store:
            assert [vote.rater for vote in store.votes()] == ["Ann"] * 4
            assert Raters(store).join("ann") is None  # the name still belongs to her
            assert Raters(store).holder(Raters(store).invite("ann")) == "Ann"
    assert _contents(path)[3][0].time == "2026-01-01T00:00:00.000+00:00"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE votes SET answer = '[0, 1]' WHERE rowid = 1")
    connection.close()
    _refused(path, folders, "table votes, row 1 differs from its checksum")


def test_two_that_begin_at_once_share_one_file(folders, tmp_path):
    path = tmp_path / "votes.sqlite"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: open_study(path, "pairs", folders), range(8)))
    task = next(iter(stores[0].tasks))
    for number, store in enumerate(stores):
        store.add(f"rater {number}", task, "preference", (1, 0), [0, 1])
    assert all(len(store.votes()) == 8 for store in stores)
    for store in stores:
        store.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "tuned", "votes.sqlite"]
    assert path.stat().st_mode & 0o077 == 0  # it contains the secret behind the links
