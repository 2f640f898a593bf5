"""Files with thousands of damaged bytes: undamaged rows are still read and the others are counted; the only error is a
ValueError that refuses the file."""

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.sources import SOURCES, Damaged, Outcome, Record

SAMPLES = 12


def read(name: str, file: Path) -> list[Outcome] | None:
    """Return None if the file is refused."""
    try:
        chunks = SOURCES[name].chunks([file])
    except ValueError:
        return None
    return [row for chunk in chunks for row in SOURCES[name].read(chunk)]


def damage(data: bytes, rng: random.Random) -> tuple[bytes, set[int]]:
    """Return the same number of bytes or fewer, and the positions that changed."""
    changed = bytearray(data)
    kind = rng.choice(["flips", "flips", "noise", "zeros", "cut"])
    if kind == "flips":
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(len(data)) :]
    else:
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice([1, 10, 100, 1000, 10000]))
        changed[start:stop] = bytes(stop - start) if kind == "zeros" else rng.randbytes(stop - start)
    both = (np.frombuffer(content[: len(changed)], np.uint8) for content in (data, bytes(changed)))
    return bytes(changed), {*np.flatnonzero(np.not_equal(*both)).tolist(), *range(len(changed), len(data))}


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_parquet(tmp_path: Path, checksums: bool, compression: str) -> None:
    rng = random.Random(0)
    count, group = 24, 4
    table = {
        "jpg_0": [rng.randbytes(100) for _ in range(count)],
        "jpg_1": [rng.randbytes(100) for _ in range(count)],
        "caption": [f"prompt {i}" for i in range(count)],
        "label_0": [float(i % 2) for i in range(count)],
        "label_1": [float(1 - i % 2) for i in range(count)],
        "has_label": [True] * count,
    }
    file = tmp_path / "a.parquet"
    options: dict[str, Any] = {"compression": compression, "write_page_checksum": checksums}
    pq.write_table(pa.table(table), file, row_group_size=group, **options)
    data, clean = file.read_bytes(), read("pickapic", file)
    assert clean is not None
    metadata = pq.ParquetFile(file).metadata
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    starts = [metadata.row_group(i).column(0).dictionary_page_offset for i in range(metadata.num_row_groups)]
    kinds: Counter[type] = Counter()
    for _ in range(100):
        changed, wrong = damage(data, rng)
        file.write_bytes(changed)
        rows = read("pickapic", file)
        kinds.update([type(None)] if rows is None else map(type, rows))
        in_footer = any(i >= footer or i < 4 for i in wrong)
        assert rows is not None or in_footer
        if rows is None or in_footer:
            assert len(rows or []) <= count
            continue
        assert [row.where for row in rows] == [row.where for row in clean]
        groups = {sum(start <= i for start in starts) - 1 for i in wrong}
        for i, (row, before) in enumerate(zip(rows, clean, strict=True)):
            # Without checksums a wrong byte of an image is not noticed; `prepare` decodes images.
            assert row == before or (i // group in groups and (not checksums or isinstance(row, Damaged)))
    assert min(kinds[kind] for kind in (type(None), Record, Damaged)) > 10


def test_parquet_of_any_column_types(tmp_path: Path) -> None:
    rng = random.Random(0)
    values: list[list[Any]] = [
        [b"x", b"y", None], ["x", "y", None], [1, 0, None], [float("nan"), 1e308, -1e308], [True, False, None],
        [None, None, None], [[1], [2, 3], None], [{"bytes": b"x"}, {"bytes": None}, None], [2**63 - 1, -(2**63), 0],
    ]  # fmt: skip
    refused = 0
    for i in range(100):
        table = {"jpg_0": [b"x"] * 3, "jpg_1": [b"y"] * 3, "caption": ["a"] * 3, "label_0": [1.0, 0.0, 1.0]}
        for name in rng.sample([*table, "label_1", "has_label", "model_0"], rng.randint(1, 2)):
            table[name] = rng.choice(values)
        pq.write_table(pa.table(table), file := tmp_path / f"{i}.parquet")
        rows = read("pickapic", file)
        assert rows is None or len(rows) == 3
        refused += rows is None
    assert 20 < refused < 80


def jsonl_line(i: int) -> dict[str, Any]:
    return {"prompt": f"prömpt {i}", "images": ["a.png", "b.png", "c.png"], "scores": [i % 3, 1.5, i % 2]}


WRONG_LINES: list[Callable[[dict[str, Any], random.Random], bytes]] = [
    lambda row, rng: damage(json.dumps(row, ensure_ascii=False).encode(), rng)[0],
    lambda row, rng: b"[" * rng.choice([10, 1000, 100000]),
    lambda row, rng: b'{"prompt":' * 100000,
    lambda row, rng: rng.randbytes(rng.randrange(1, 300)),
    lambda row, rng: json.dumps(row | {"scores": rng.choice(["x", [], [1], [[]], {}, [float("nan")] * 3])}).encode(),
    lambda row, rng: json.dumps(row | {"scores": [1, 2, rng.choice([10**4000, -(10**400), None])]}).encode(),
    lambda row, rng: json.dumps(row).replace("1.5", rng.choice(["1e999", "-", "9" * 10000, "Infinity"])).encode(),
    lambda row, rng: json.dumps({name: row[name] for name in row if name != "scores"} | {"votes": [1, -1, 0]}).encode(),
    lambda row, rng: json.dumps(row | {"images": ["a.png", "b.png", rng.choice(["../x", "/", "\0", 1, ""])]}).encode(),
    lambda row, rng: json.dumps(row | {"images": ["a.png", "b.png", "x" * rng.choice([300, 5000])]}).encode(),
    lambda row, rng: json.dumps(row | {rng.choice(list(row)): rng.choice([None, 1, [], {}, "x", True])}).encode(),
    lambda row, rng: json.dumps(row | {"prompt": rng.choice(["\ud800", "\udfff a", 3, ["a"]])}).encode(),
]  # fmt: skip


def test_jsonl(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    lines = [json.dumps(jsonl_line(i)).encode() for i in range(SAMPLES)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    clean = read("jsonl", file)
    assert clean is not None
    kinds: Counter[type] = Counter()
    for i in range(200):
        wrong = set(rng.sample(range(SAMPLES), rng.randint(1, 4)))
        changed = [
            WRONG_LINES[i % len(WRONG_LINES)](jsonl_line(k), rng) if k in wrong else lines[k] for k in range(SAMPLES)
        ]
        changed = [line.replace(b"\n", b" ") for line in changed]
        file.write_bytes(b"\n".join(changed))
        rows = read("jsonl", file)
        assert rows is not None
        by_place = {row.where: row for row in rows}
        assert len(by_place) == len(rows)
        for k, line in enumerate(changed):
            row = by_place.pop(f"{file} row {k}", None)
            assert row == clean[k] if k not in wrong else (row is None) == (not line.strip())
            if row and k in wrong:
                kinds[type(row)] += 1
        assert not by_place
    assert kinds[Damaged] > 300


def test_json_lists(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"prömpt {i}", "path1": "a", "path2": "b", "choice_dist": [i, 3]} for i in range(SAMPLES)]
    data = json.dumps(rows, ensure_ascii=False).encode()
    file = tmp_path / "a.json"
    refused = 0
    for _ in range(200):
        changed, _ = damage(data, rng)
        file.write_bytes(changed)
        found = read("hpdv3", file)
        try:
            count = len(json.loads(changed.decode(errors="replace"), strict=False))
        except ValueError:
            # Commas between complete objects may be missing or doubled; no other damage is accepted.
            assert found is None or len(found) <= SAMPLES
        else:
            assert found is not None
            assert len(found) == count
        refused += found is None
    assert 50 < refused < 190


def test_tar(tmp_path: Path) -> None:
    rng = random.Random(0)
    buffer, spans = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(SAMPLES):
            start = tar.offset
            images = {"jpg_0.jpg": rng.randbytes(12000), "jpg_1.jpg": rng.randbytes(12000)}
            for part, value in {**images, "label_0.txt": b"1", "original_prompt.txt": b"a cat"}.items():
                info = tarfile.TarInfo(f"{i:03}{'é' * (i % 2)}.{part}")  # accents require extended headers
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
            spans.append(range(start, tar.offset))
    data, file = buffer.getvalue(), tmp_path / "a.tar"
    file.write_bytes(data)
    clean = read("pickapic_tar", file)
    assert clean is not None
    assert [type(row) for row in clean] == [Record] * SAMPLES
    kinds: Counter[type] = Counter()
    for _ in range(200):
        changed, wrong = damage(data, rng)
        file.write_bytes(changed)
        rows = read("pickapic_tar", file)
        kinds.update([type(None)] if rows is None else map(type, rows))
        if rows is None:
            assert min(wrong) < 512  # the first header
            continue
        for span, before in zip(spans, clean, strict=True):
            found = [row for row in rows if row.where == before.where]
            if wrong.isdisjoint(span):
                assert found == [before]
            elif len(wrong) < 512 and "é" not in before.where:  # too few to damage all headers, and each has the name
                assert found
        assert len([row for row in rows if isinstance(row, Record)]) <= SAMPLES
        # Missing samples are reported, if not by their names.
        assert len({row.where for row in rows}) >= SAMPLES or any(isinstance(row, Damaged) for row in rows)
    assert kinds[Damaged] > 50
