"""What `prepare` makes of records: stored images, records, splits, counts."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import xxhash

from dpo_jax.data.images import decode
from dpo_jax.data.prepare import builder, merge, worker
from dpo_jax.data.prepare.builder import Progress, prepare
from dpo_jax.data.sources import SOURCES, Damaged, Dropped
from dpo_jax.data.store import prepared
from dpo_jax.data.store.prepared import open_prepared

from .conftest import bytes_of, encode, noise_jpeg
from .source_files import in_memory, record

Write = Callable[..., Path]
PICKAPIC = SOURCES["pickapic"]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return pa.ipc.open_file(str(folder / "records.arrow")).read_all().to_pylist()


def images_of(folder: Path) -> list[bytes]:
    data = tfds.builder_from_directory(folder / "images").as_data_source(
        "images", decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [data[i]["image"] for i in range(len(data))]


def test_stored_as_it_came(write_pairs: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder may exist
    files = [write_pairs(10), write_pairs(3, "b.parquet", jpg_0=[noise_jpeg(100 + i) for i in range(3)])]
    summary = prepare(PICKAPIC, files, tmp_path / "out", workers=0, validation_fraction=0.3)
    records, images = records_of(tmp_path / "out"), images_of(tmp_path / "out")
    got = [[images[i] for i in record["images"]] for record in records]
    first = [[noise_jpeg(2 * i + 1 - i % 2), noise_jpeg(2 * i + i % 2)] for i in range(10)]
    second = [[noise_jpeg(2 * i + 1), noise_jpeg(100 + i)][:: -1 if i % 2 else 1] for i in range(3)]
    assert got == first + second
    split = records[1].pop("split")
    assert records[1] == {
        "caption": "prompt 0",
        "captions": None,
        "images": [2, 3],
        "preference": [1.0, 0.0],
        "models": ["a", "b"],
        "where": f"{files[0]} row 1",
    }
    assert split in ("train", "validation")
    table = pa.ipc.open_file(str(tmp_path / "out" / "images.arrow")).read_all()
    assert table["sha256"].to_pylist() == [hashlib.sha256(data).digest() for data in images]
    assert [(row["width"], row["height"]) for row in table.to_pylist()[:2]] == [(40, 56), (56, 40)]
    assert len(open_prepared(tmp_path / "out")) == 13
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in bytes_of(tmp_path / "out").items()}
    for name in ("quarantine.jsonl", "checksums.json", "contact_sheet.png", "heldout_prompts.jsonl"):
        del digests[name]
    assert json.loads((tmp_path / "out" / "checksums.json").read_text()) == {"xxh3_128": digests}
    assert not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(vars(summary)))
    assert (summary.rows, summary.records, summary.pairs, summary.images, summary.duplicates) == (13, 13, 13, 23, 3)
    assert list(summary.resolutions.items()) == [("56x40", 12), ("40x56", 11)]


def test_tfds_alone_reads_the_images(write_pairs: Write, tmp_path: Path) -> None:
    prepare(PICKAPIC, [write_pairs(3)], tmp_path / "out", workers=0)
    code = (
        "import sys, tensorflow_datasets as tfds; "
        "data = tfds.builder_from_directory(sys.argv[1]).as_data_source('images'); "
        "print([data[i]['image'].shape for i in range(len(data))][:2], len(data), "
        "any(name in sys.modules for name in ('tensorflow', 'jax')))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out" / "images"], capture_output=True, text=True)
    assert done.stdout == "[(56, 40, 3), (40, 56, 3)] 6 False\n", done.stderr


def test_images_are_stored_once_within_and_across_parts(tmp_path: Path) -> None:
    a, b, c, d, bad = (*(noise_jpeg(i) for i in range(4)), b"bad")
    source = in_memory(
        [record(a, b), record(b, a), record(b, b, captions=("x", "y"))],
        [record(b, bad), record(a, b)],  # stores no new image
        [record(c, a), record(d, c)],  # stores c and d, without a
        [record(bad, b)],  # stores no record
        [record(d, d, a, b, c)],
    )
    worker.make_part(source, source.chunks([tmp_path])[0], tmp_path / "part")
    assert pq.read_metadata(tmp_path / "part" / "images.parquet").num_rows == 2
    summary = prepare(source, [tmp_path], tmp_path / "out", workers=0, max_damaged_fraction=1)
    assert images_of(tmp_path / "out") == [a, b, c, d]
    got = [record["images"] for record in records_of(tmp_path / "out")]
    assert got == [[0, 1], [1, 0], [1, 1], [0, 1], [2, 0], [3, 2], [3, 3, 0, 1, 2]]
    shards = sorted(path.name for path in (tmp_path / "out" / "images").glob("*parquet*"))
    assert shards == [f"preference_images-images.parquet-0000{i}-of-00002" for i in range(2)]
    assert (summary.images, summary.duplicates, summary.quarantined) == (4, 13, 2)


def test_an_image_stays_with_the_first_part_that_has_it(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(600)]
    of_parts = [[digests[i] for i in random.permutation(600)[:count]] for count in (300, 0, 500, 1, 40, 600)]
    folders = [tmp_path / f"{number}" for number in range(len(of_parts))]
    for folder, found in zip(folders, of_parts, strict=True):
        folder.mkdir()
        worker._write(folder / "images.arrow", prepared.IMAGES, [{"sha256": d, "width": 1, "height": 1} for d in found])
    places: dict[bytes, int] = {}
    for folder, found, part in zip(folders, of_parts, merge._identify(folders, tmp_path), strict=True):
        owns = [digest not in places for digest in found]
        for digest in found:
            places.setdefault(digest, len(places))
        assert part.folder == folder
        assert part.places.tolist() == [places[digest] for digest in found]
        assert (part.owns.tolist(), part.owned) == (owns, sum(owns))


@pytest.mark.parametrize("fraction", [0.0, 1e-6, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("distinct", [1, 2, 3, 500])
def test_prompts_are_split_by_their_hash(tmp_path: Path, fraction: float, distinct: int) -> None:
    random = np.random.default_rng(distinct)
    known = random.integers(0, 2**64, distinct, np.uint64)
    of_parts = [known[random.integers(0, distinct, count)] for count in (400, 0, 300)] + [known]
    folders = [tmp_path / f"{number}" for number in range(len(of_parts))]
    for folder, hashes in zip(folders, of_parts, strict=True):
        folder.mkdir()
        worker._write(folder / "records.arrow", worker.RECORDS, [{"prompt": int(value)} for value in hashes])
    limit, prompts = merge._split(folders, tmp_path, fraction)
    ordered = sorted(known.tolist())
    held_out = sum(value / 2**64 < fraction for value in ordered)
    if fraction:
        held_out = min(max(held_out, 1), distinct - 1)
    assert [value < limit for value in ordered] == [True] * held_out + [False] * (distinct - held_out)
    sides = {"train": distinct - held_out, "validation": held_out}
    assert prompts == {name: count for name, count in sides.items() if count}


def test_no_image_is_better_than_itself(tmp_path: Path) -> None:
    a, b, c = (noise_jpeg(i) for i in range(3))
    pixels, white = np.asarray(decode(a)), np.full((64, 64, 3), 255, np.uint8)
    nearly = white.copy()
    nearly[-1] = 0
    source = in_memory(
        [
            record(a, a),
            record(a, a, preference=(0.5, 0.5)),
            record(b, b, b),
            record(encode(pixels, "PNG"), encode(pixels, "BMP")),
            record(encode(white, "PNG"), encode(nearly, "PNG")),
            record(a, a, captions=("mine", "yours")),  # which of two captions fits an image is a preference
            record(a, b, a, c, preference=(0.5, 0.25, 0.125, 0.125), models=("1", "2", "3", "4")),
            record(a, b, a, preference=(0.5, 0.5, 0.0), models=("1", "2", "3")),
            record(a, b, b, b, preference=(0.4, 0.2, 0.2, 0.2)),
            record(a),
        ]
    )
    summary = prepare(source, [tmp_path], tmp_path / "out", workers=0)
    assert summary.dropped == {"all candidates are the same image": 4}
    assert "dropped      4 all candidates are the same image" in str(summary)
    assert (summary.records, summary.ties, summary.pairs) == (6, 0, 2)
    alike, *got = [(r["images"], r["preference"], r["models"]) for r in records_of(tmp_path / "out")]
    assert alike[:2] == ([0, 1], [1, 0])  # all white, except for the last row of one
    assert got[0][:2] == ([2, 2], [1, 0])
    assert got[1] == ([2, 2, 3, 4], [0.3125, 0.3125, 0.25, 0.125], ["1", "3", "2", "4"])
    assert got[2] == ([3, 2, 2], [0.5, 0.25, 0.25], ["2", "1", "3"])
    assert got[3][:2] == ([2, 3, 3, 3], pytest.approx([0.4, 0.2, 0.2, 0.2]))
    assert got[4][:2] == ([2], [1])


def test_every_row_is_counted(tmp_path: Path) -> None:
    a, b = noise_jpeg(0), noise_jpeg(1)
    half = {"preference": (0.5, 0.5)}
    source = in_memory(
        [record(a, b), record(a, b, **half), Dropped("row", "without a label"), Damaged("f row 3", "not a number")],
        [record(a, b, b, preference=(1 / 3,) * 3), record(a), Dropped("row", "without a label"), record(a, None)],
        [record(a, b, captions=("mine", "yours")), Dropped("row", "without a caption"), record(a[:-99], b)],
    )
    summary = prepare(source, [tmp_path], tmp_path / "out", workers=0, max_damaged_fraction=0.5)
    assert summary.rows == 11 == summary.records + summary.dropped.total() + summary.quarantined
    assert (summary.records, summary.pairs, summary.ties, summary.quarantined) == (5, 3, 2, 3)
    assert summary.candidates == {"2": 3, "3": 1, "1": 1}
    assert summary.dropped == {"without a label": 2, "without a caption": 1}
    assert summary.damaged == {"not a number": 1, "no image": 1, "image file is truncated": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"where": "f row 3", "reason": "not a number"},
        {"where": "row", "caption": "a cat", "candidate": 1, "reason": "no image"},
        {"where": "row", "caption": "a cat", "candidate": 0, "reason": "image file is truncated"},
    ]
    assert "3 with 2 candidates" in str(summary)
    assert "3 (1 not a number, 1 no image, 1 image file is truncated)" in str(summary)
    assert records_of(tmp_path / "out")[4]["captions"] == ["mine", "yours"]


def test_no_prompt_is_in_both_splits(write_pairs: Write, tmp_path: Path) -> None:
    captions = [f"{'A' if i % 3 else 'a'} cat  {i % 10}" if i % 2 else f"a cat {i % 10}" for i in range(30)]
    file = write_pairs(30, caption=captions)
    summary = prepare(PICKAPIC, [file], tmp_path / "out", workers=0, validation_fraction=0.3)

    def prompts(split: str) -> set[str]:
        of_split = [r["caption"] for r in records_of(tmp_path / "out") if r["split"] == split]
        assert len(of_split) == summary.splits[split]
        return {" ".join(caption.lower().split()) for caption in of_split}

    held_out = {f"a cat {i}" for i in range(10) if hashlib.sha256(f"a cat {i}".encode()).digest()[0] < 0.3 * 256 - 1}
    assert prompts("validation") == held_out
    assert prompts("train") == {f"a cat {i}" for i in range(10)} - held_out
    assert summary.prompts == {"train": 10 - len(held_out), "validation": len(held_out)}


@pytest.mark.parametrize(("fraction", "sides"), [(1e-6, [1, 1]), (1.0, [1, 1]), (0.0, [2])])
def test_a_small_data_set_keeps_a_prompt_on_both_sides(
    write_pairs: Write, tmp_path: Path, fraction: float, sides: list[int]
) -> None:
    summary = prepare(PICKAPIC, [write_pairs(4)], tmp_path / "out", workers=0, validation_fraction=fraction)
    assert list(summary.prompts.values()) == sides


def test_a_single_prompt_is_trained_on(write_pairs: Write, tmp_path: Path) -> None:
    assert prepare(PICKAPIC, [write_pairs(2)], tmp_path / "out", workers=0).prompts == {"train": 1}


def test_too_much_damage_keeps_the_parts(write_pairs: Write, tmp_path: Path) -> None:
    jpg_0 = [noise_jpeg(2 * i) for i in range(10)]
    jpg_0[2] = jpg_0[5] = jpg_0[8] = b"not an image at all"
    file, output = write_pairs(10, jpg_0=jpg_0), tmp_path / "out"
    with pytest.raises(
        ValueError, match=rf"3 of 10 records are damaged \(for example {file} row 2: not an image\), more than "
    ):
        prepare(PICKAPIC, [file], output, workers=0, max_damaged_fraction=0.29)
    assert not output.exists()
    steps: list[Progress] = []
    summary = prepare(PICKAPIC, [file], output, workers=0, max_damaged_fraction=0.3, on_progress=steps.append)
    assert steps[0] == Progress("reading", 1, 1, 7)
    assert (summary.records, summary.quarantined) == (7, 3)


def test_hopeless_damage_ends_a_run_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "RECORDS_TO_JUDGE_BY", 5)
    good, bad = record(noise_jpeg(0)), record(b"bad")
    steps: list[Progress] = []
    source = in_memory([good] * 2 + [bad] * 2, [good] * 4, [bad] * 4, [good] * 4)
    with pytest.raises(ValueError, match="6 of 12 records are damaged"):  # with 16 records, 4 could be damaged
        prepare(source, [tmp_path], tmp_path / "a", workers=0, max_damaged_fraction=0.25, on_progress=steps.append)
    assert steps[-1].done == 3


def test_damage_at_the_beginning_is_waited_out(tmp_path: Path) -> None:
    good, bad = record(noise_jpeg(0)), record(b"bad")
    source = in_memory([bad], [good] * 10)
    assert prepare(source, [tmp_path], tmp_path / "out", workers=0, max_damaged_fraction=0.1).quarantined == 1


def test_unusable_input(write_pairs: Write, tmp_path: Path) -> None:
    def fails(message: str, **columns: object) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(PICKAPIC, [write_pairs(4, **columns)], tmp_path / "out", workers=0)

    fails("has no column", jpg_1=None)
    fails(r"none of the 4 rows of .*pairs.parquet can be used \(4 without a label\)", has_label=[False] * 4)
    pq.write_table(pq.read_table(write_pairs(1)).slice(0, 0), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"none of the 0 rows of .* can be used \(none\)"):
        prepare(PICKAPIC, [tmp_path / "pairs.parquet"], tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    prepare(PICKAPIC, [write_pairs(4)], tmp_path / "out", workers=0)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="already exists and is not an empty folder"):
        prepare(PICKAPIC, [write_pairs(4)], tmp_path / "out", workers=0)
    assert bytes_of(tmp_path / "out") == before


# The peak since the process began its program; getrusage would include the memory of the test's own process.
MEASURE = """
import re, sys
from pathlib import Path
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import SOURCES
prepare(SOURCES["pickapic"], [Path(file) for file in sys.argv[2:]], Path(sys.argv[1]), workers=0)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_is_flat(write_pairs: Write, tmp_path: Path) -> None:
    """One process reads, verifies and merges."""
    random = np.random.default_rng(0)
    jpegs = {"jpg_0": noise_jpeg(0), "jpg_1": noise_jpeg(1)}

    def padded(name: str) -> bytes:
        return jpegs[name] + random.bytes(40_000)  # any bytes may follow the end of a JPEG

    files = [
        write_pairs(100, f"{n}.parquet", **{name: [padded(name) for _ in range(100)] for name in jpegs})
        for n in range(10)
    ]

    def kilobytes(files: list[Path]) -> int:
        command = [sys.executable, "-c", MEASURE, tmp_path / f"out{len(files)}", *files]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    once, ten_times = kilobytes(files[:1]), kilobytes(files)
    assert ten_times < 1.2 * once, f"{once} kB, then {ten_times} kB"
