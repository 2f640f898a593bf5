"""`prepare` with several workers, killed, continued, and run twice at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_jax.data.prepare import builder, worker
from dpo_jax.data.prepare.builder import Progress, prepare
from dpo_jax.data.sources import SOURCES, Chunk, Source

from .conftest import bytes_of, noise_jpeg
from .source_files import in_memory, record

Write = Callable[..., Path]
PICKAPIC = SOURCES["pickapic"]


@pytest.fixture
def many_parts(write_pairs: Write, tmp_path: Path) -> list[Path]:
    """Six files of 4 pairs, one chunk each; some images repeat, one is damaged, and two rows are dropped."""
    return [
        write_pairs(
            4,
            f"{n}.parquet",
            jpg_0=[noise_jpeg(100 + 3 * n + i) for i in range(3)] + [b"bad" if n == 3 else noise_jpeg(n)],
            caption=[None if n == 5 and i == 0 else f"prompt {n + i}" for i in range(4)],
            label_0=[None if n == 4 else 0.5, 1.0, 0.0, 1.0],
            label_1=[0.5, 0.0, 1.0, 0.0],
        )
        for n in range(6)
    ]


def test_same_bytes_whatever_the_workers(many_parts: list[Path], tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        output = tmp_path / f"out{workers}"
        prepare(PICKAPIC, many_parts, output, workers=workers, max_damaged_fraction=0.1, validation_fraction=0.3)
    expected = bytes_of(tmp_path / "out0")
    assert len(expected) == 7 + 2 + 6
    assert bytes_of(tmp_path / "out1") == expected
    assert bytes_of(tmp_path / "out2") == expected


# Reads like Pick-a-Pic, but 4.parquet only when a file "go" exists. If a file "die" exists, it ends its process, while
# another is busy with 3.parquet.
STUB = """
import os, time
from dpo_jax.data.sources import SOURCES, Source

def read(chunk):
    die, go = (chunk.file.with_name(name) for name in ("die", "go"))
    if chunk.file.name == "3.parquet" and die.exists():
        time.sleep(60)
    while chunk.file.name == "4.parquet" and not go.exists():
        time.sleep(0.2)
        if die.exists():
            os.kill(os.getpid(), 9)
    yield from SOURCES["pickapic"].read(chunk)

SLOW = Source(SOURCES["pickapic"].chunks, read, "as Pick-a-Pic, but slow")
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow_source.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "slow_source", raising=False)
    import slow_source

    return slow_source.SLOW


def test_killed_and_continued_gives_the_same_bytes(slow: Source, many_parts: list[Path], tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from slow_source import SLOW; "
        "from dpo_jax.data.prepare.builder import prepare; "
        "prepare(SLOW, [Path(file) for file in sys.argv[3:]], Path(sys.argv[2]), workers=2, max_damaged_fraction=0.1)"
    )
    command = [sys.executable, "-c", code, tmp_path / "modules", output, *many_parts]
    process = subprocess.Popen(command, start_new_session=True)
    expected = [partial / "parts" / f"0000{i}" for i in (0, 1, 2, 3, 5)]
    deadline = time.monotonic() + 60
    while not all(part.exists() for part in expected):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert len(list((partial / "parts").glob(".00004.*"))) == 1
    before = {path: path.stat().st_mtime_ns for part in expected for path in part.iterdir()}

    steps: list[Progress] = []
    unchanged = []

    def on_progress(progress: Progress) -> None:
        steps.append(progress)
        if progress.step == "reading":
            unchanged.append({path: path.stat().st_mtime_ns for path in before} == before)

    with pytest.raises(
        FileExistsError,
        match=r"unfinished run of another input \(with different files\); .*rm -r .*\.out\.partial",
    ):
        prepare(slow, many_parts[:-1], output, workers=0)
    (tmp_path / "go").touch()
    prepare(slow, many_parts, output, workers=2, max_damaged_fraction=0.1, on_progress=on_progress)
    assert [(step.step, step.done) for step in steps] == [
        ("reading", 5),
        ("reading", 6),
        *(("merging", n) for n in range(1, 7)),
    ]
    assert unchanged == [True, True]
    prepare(slow, many_parts, tmp_path / "whole", workers=0, max_damaged_fraction=0.1)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.parametrize("shards", [1, 4])
def test_killed_while_merging(many_parts: list[Path], tmp_path: Path, shards: int) -> None:
    def stop(progress: Progress) -> None:
        if (progress.step, progress.done) == ("merging", shards):
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1, on_progress=stop)
    assert not output.exists()
    prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1)
    prepare(PICKAPIC, many_parts, tmp_path / "whole", workers=0, max_damaged_fraction=0.1)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("step", [("reading", 4), ("merging", 3)])
def test_what_a_crash_of_the_machine_cut_short_is_made_again(
    many_parts: list[Path], tmp_path: Path, step: tuple[str, int]
) -> None:
    def stop(progress: Progress) -> None:
        if (progress.step, progress.done) == step:
            raise KeyboardInterrupt

    output, made = tmp_path / "out", tmp_path / ".out.partial" / "parts"
    with pytest.raises(KeyboardInterrupt):
        prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1, on_progress=stop)
    os.truncate(made / "00000" / "records.arrow", 100)
    os.truncate(made / "00002" / "counts.json", 0)
    (made / "00003" / "damaged.jsonl").unlink()
    steps: list[Progress] = []
    prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1, on_progress=steps.append)
    assert steps[0][:2] == ("reading", {"reading": 1, "merging": 3}[step[0]])
    prepare(PICKAPIC, many_parts, tmp_path / "whole", workers=0, max_damaged_fraction=0.1)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_a_damaged_manifest_is_named(write_pairs: Write, tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json.*; remove .*\.out\.partial \(rm -r\) to begin again"):
        prepare(PICKAPIC, [write_pairs(2)], tmp_path / "out", workers=0)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"rows": -1}', b'{"rows": "many", "bytes": 3}'])
def test_a_part_whose_counts_are_damaged_is_made_again(write_pairs: Write, tmp_path: Path, content: bytes) -> None:
    pairs = write_pairs(3, jpg_0=[b"bad"] * 3)
    with pytest.raises(ValueError, match="3 of 3 records are damaged"):
        prepare(PICKAPIC, [pairs], tmp_path / "out", workers=0)
    (tmp_path / ".out.partial" / "parts" / "00000" / "counts.json").write_bytes(content)
    with pytest.raises(ValueError, match="3 of 3 records are damaged"):
        prepare(PICKAPIC, [pairs], tmp_path / "out", workers=0)


def test_remains_of_a_finished_run_are_no_obstacle(
    many_parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"

    def stop(folder: Path, ignore_errors: bool = False) -> None:
        if folder == partial:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1)
    output.rename(tmp_path / "whole")
    prepare(PICKAPIC, many_parts, output, workers=0, max_damaged_fraction=0.1)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
    assert not partial.exists()


def test_a_part_is_on_the_disk_before_it_counts_as_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    source = in_memory([record(noise_jpeg(0), noise_jpeg(1))])
    worker.make_part(source, source.chunks([tmp_path])[0], tmp_path / "part")
    temporary = worker.temporary_folder(tmp_path / "part", os.getpid())
    assert set(synced) == {temporary, *(temporary / file.name for file in (tmp_path / "part").iterdir())}


def test_of_two_runs_on_one_output_the_second_is_refused(slow: Source, many_parts: list[Path], tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from slow_source import SLOW; "
        "from dpo_jax.data.prepare.builder import prepare; "
        "prepare(SLOW, [Path(sys.argv[3])], Path(sys.argv[2]), workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "modules", output, many_parts[4]])
    deadline = time.monotonic() + 60
    while not list(partial.glob("parts/.00000.*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    message = rf"^{output} is in use by python -m dpo_jax\.prepare \(process {process.pid} on "
    with pytest.raises(BlockingIOError, match=message):
        prepare(PICKAPIC, [many_parts[4]], output, workers=0)
    assert list(partial.glob("parts/.00000.*"))
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    assert prepare(slow, [many_parts[4]], output, workers=0).records == 3


def test_a_file_system_without_locks_is_no_obstacle(
    write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert prepare(PICKAPIC, [write_pairs(3)], tmp_path / "out", workers=0).records == 3


def test_a_worker_that_dies_is_named_by_its_chunk(slow: Source, many_parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    with pytest.raises(ChildProcessError, match=r"the worker that read .*4\.parquet from 0 to 1 died \(SIGKILL"):
        prepare(slow, many_parts, tmp_path / "out", workers=2, max_damaged_fraction=0.1)
    assert sorted(path.name for path in (tmp_path / ".out.partial" / "parts").glob("0*")) == ["00000", "00001", "00002"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_worker_that_was_stopped_is_not_blamed(tmp_path: Path, order: int) -> None:
    processes = [SimpleNamespace(pid=pid, exitcode=code, join=lambda: None) for pid, code in ((7, -15), (8, -11))]
    chunks = {tmp_path / f"0000{i}": Chunk(Path(f"{i}.tar"), 0, 9) for i in range(2)}
    for folder, process in zip(chunks, processes, strict=True):
        worker.temporary_folder(folder, process.pid).mkdir()
    message = builder._who_died(processes[::order], chunks)
    assert message.startswith("the worker that read 1.tar from 0 to 9 died (SIGSEGV;")


def test_workers_end_with_the_main_process(slow: Source, many_parts: list[Path], tmp_path: Path) -> None:
    """Even a worker in the middle of a chunk ends; otherwise it would stay forever."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from slow_source import SLOW; "
        "from dpo_jax.data.prepare.builder import prepare; "
        "prepare(SLOW, [Path(sys.argv[3])], Path(sys.argv[2]), workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "modules", tmp_path / "out", many_parts[4]])
    deadline = time.monotonic() + 60
    while not (under_way := list((tmp_path / ".out.partial").glob("parts/.00000.*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    worker = int(under_way[0].suffix[1:])
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
