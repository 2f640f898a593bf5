"""A changed bit is reported when a data set is opened, when an image or encoding is read, and by `prepare --verify`."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from etils import epath

from dpo_jax.batch import PreferenceBatch
from dpo_jax.data.labels import judging
from dpo_jax.data.load.inputs import CachedInputs, Inputs, RawInputs
from dpo_jax.data.load.pipeline import make_iterator, validation_batches
from dpo_jax.data.load.records import open_records
from dpo_jax.data.load.views import view_batches
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.prepare.verify import verify
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store import checksums, latents
from dpo_jax.data.store.latents import StoredLatents, distinct_captions, folder_of, with_checksums, write_captions
from dpo_jax.data.store.prepared import CHECKED, open_prepared
from dpo_jax.data.store.scores import candidates, read_scores, write_scores
from dpo_jax.streams import warn
from dpo_jax.weights import safetensors_file

from .conftest import noise_jpeg
from .test_pipeline import rows_of, spell

PAIRS = 12
FACTS = {"family": "sd15", "resolution": 16, "views": [{"top": None, "left": None, "flip": False}], "data": "x"}


@pytest.fixture(autouse=True)
def _say_again() -> None:
    warn.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two shards with encodings, several files of each kind, and the scores of a judge."""
    folder = tmp_path_factory.mktemp("whole")
    for i in range(2 * PAIRS):
        (folder / f"{i}.jpg").write_bytes(noise_jpeg(i))
    rows = [
        {"prompt": f"prompt {i}", "images": [f"{2 * i}.jpg", f"{2 * i + 1}.jpg"], "preferred": 0} for i in range(PAIRS)
    ]
    files = [folder / f"{part}.jsonl" for part in range(2)]
    for part, file in enumerate(files):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[part::2]))
    prepare(SOURCES["jsonl"], files, folder / "data", workers=0, validation_fraction=0.1)
    write_encodings(folder / "data")
    of = candidates(open_prepared(folder / "data").records["images"])
    write_scores(folder / "data", "mine", "by hand", np.arange(2 * PAIRS, dtype=np.float32), of, {})
    return folder / "data"


def write_encodings(data: Path) -> StoredLatents:
    """Store random encodings, in files of 10 rows."""
    prepared, rng = open_prepared(data), np.random.default_rng(0)
    captions = distinct_captions(prepared)
    folder = folder_of(data, FACTS)
    folder.mkdir(parents=True)
    write_captions(folder, captions)

    def write(kind: str, count: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        starts = range(0, count, 10)
        for number, start in enumerate(starts):
            rows = min(10, count - start)
            tensors = {
                name: rng.normal(size=(rows, *shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
            }
            both = with_checksums(tensors)
            header = {name: (tensor.shape, tensor.dtype) for name, tensor in both.items()}
            safetensors_file.write(epath.Path(folder / latents.file_name(kind, number)), both.items(), header)
        return {"files": len(starts), "rows_a_file": 10}

    images = write("images", len(prepared.images), {"moments": (1, 2, 2, 8)})
    texts = write("captions", len(captions), {"context": (3, 4), "pooled": (0,)})
    written = {"facts": FACTS, "images": images, "captions": texts}
    digest = checksums.checksum(folder / "captions.arrow")
    (folder / "encoding.json").write_text(json.dumps(written | {"captions_checksum": digest}))
    return latents.open_latents(data, FACTS)


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def inputs_of(data: Path, kind: str) -> Inputs:
    return CachedInputs(latents.open_latents(data, FACTS)) if kind == "encodings" else RawInputs(16, spell, True, True)


def epoch(data: Path, kind: str, **options: Any) -> list[PreferenceBatch]:
    """Return every training record once."""
    pairs = open_records(data, "train", judges=options.pop("judges", ()))
    with make_iterator(pairs, inputs_of(data, kind), batch_size=1, seed=3, **options) as batches:
        return list(itertools.islice(batches, len(pairs) // options.get("shard_count", 1)))


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def flip_image(data: Path, position: int) -> None:
    images = open_prepared(data).images
    file = next(file for file, positions in images.positions() if position in positions)
    flip(file, file.read_bytes().index(images[position].tobytes()) + 300)


def differing(found: list[PreferenceBatch], expected: list[PreferenceBatch]) -> list[int]:
    """Return the examples that differ; they must have weight 0."""
    rows = []
    for i, (one, other) in enumerate(zip(rows_of(found), rows_of(expected), strict=True)):
        flat = [
            np.concatenate([np.ravel(x).astype(np.float64) for x in (*row.inputs, *row[1:]) if x is not None])
            for row in (one, other)
        ]
        if not np.array_equal(*flat):
            assert one.weight_B == 0
            assert all(not np.any(x) for x in one.inputs)
            rows.append(i)
    return rows


@pytest.mark.parametrize("kind", ["images", "encodings"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_training_in_silence(whole: Path, tmp_path: Path, kind: str, seed: int) -> None:
    """Wherever the bit is, the data set is refused, or the sample that would differ is left out and reported."""
    rng = np.random.default_rng(seed)
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    names = [name for name in names if name.name not in ("quarantine.jsonl", "mine.json")]
    expected = epoch(whole, kind, judges=("mine",))
    refused = []
    for number, name in enumerate(names):
        data = tmp_path / str(number)
        shutil.copytree(whole, data)
        flip(data / name, int(rng.integers((data / name).stat().st_size)), int(rng.integers(8)))
        error, found = outcome(data, kind)
        if error:
            assert "\n" not in error
            assert str(data) in error
            refused.append(str(name))
        else:
            differing(found, expected)
    assert set(CHECKED) <= set(refused)


def outcome(data: Path, kind: str) -> tuple[str, list[PreferenceBatch]]:
    try:
        return "", epoch(data, kind, judges=("mine",))
    except ValueError as error:
        return str(error), []


@pytest.mark.parametrize("kind", ["images", "encodings"])
def test_a_damaged_sample_is_left_out_alike_on_any_number_of_processes(
    whole: Path, data: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = epoch(data, kind)
    pairs = open_records(data, "train")
    victim = pairs[4]
    if kind == "images":
        flip_image(data, victim["images"][1])
    else:
        folder = folder_of(data, FACTS)
        number, row = divmod(victim["images"][1], 10)
        file = folder / f"images-{number:05}.safetensors"
        offset, shape = safetensors_file.locate(epath.Path(file))["moments"]
        flip(file, offset + row * int(np.prod(shape[1:])) * 2 + 5)
    found = epoch(data, kind)
    (row,) = differing(found, expected)
    assert [float(batch.weight_B[0]) for batch in found].count(0) == 1
    said = capsys.readouterr().err
    where = "has changed" if kind == "encodings" else "have changed"
    assert said.count("warning: ") == 1
    assert re.search(rf"warning: record \d+ of {data} \(.*jsonl row \d+\): .* {where}; it is left out\n", said)
    shards = [rows_of(epoch(data, kind, shard_index=i, shard_count=2, size_conditioning="constant")) for i in range(2)]
    together = [row for pair in zip(*shards, strict=True) for row in pair]
    for one, other in zip(together, rows_of(found), strict=False):
        for left, right in zip((*one.inputs, *one[1:]), (*other.inputs, *other[1:]), strict=True):
            np.testing.assert_array_equal(left, right)
    assert capsys.readouterr().err == ""  # reported only once
    batched = make_iterator(pairs, inputs_of(data, kind), batch_size=len(pairs), seed=3, size_conditioning="real")
    with batched as batches:
        (batch,) = itertools.islice(batches, 1)
        assert len(batches.damaged) == 1
        assert list(np.flatnonzero(batch.weight_B == 0)) == [row]


def test_more_than_a_few_damaged_records_end_the_run(data: Path) -> None:
    pairs = open_records(data, "train")
    for index in (0, 3):
        flip_image(data, pairs[index]["images"][0])
    message = r"2 of \d+ records have damaged images or latents, more than the 1% .*; the last is record \d+ of .*"
    with pytest.raises(ValueError, match=message):
        epoch(data, "images")
    held_out = open_records(data, "validation")
    assert len(held_out) == 1
    flip_image(data, held_out[0]["images"][0])
    with (
        pytest.raises(ValueError, match=r"1 of 1 records have damaged images"),
        validation_batches(held_out, inputs_of(data, "images"), batch_size=1) as batches,
    ):
        next(batches)


def test_a_judge_leaves_out_a_damaged_image(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mean(images: Any, captions: Any) -> np.ndarray:
        return np.array([image.mean() for image in images])

    expected = judging.score_images(open_prepared(data), mean, batch=4)
    prepared = open_prepared(data)
    position = prepared.record(5)["images"][1]
    flip_image(data, position)
    found = judging.score_images(open_prepared(data), mean, batch=4)
    assert list(np.flatnonzero(np.isnan(found))) == [11]
    np.testing.assert_array_equal(np.delete(found, 11), np.delete(expected, 11))
    assert f"warning: record 5 of {data} (" in capsys.readouterr().err
    flip_image(data, prepared.record(6)["images"][0])
    with pytest.raises(ValueError, match=r"2 of 24 images are damaged, more than the 1% .*; the last is record"):
        judging.score_images(open_prepared(data), mean, batch=4)


def test_a_damaged_image_is_named_when_it_would_be_encoded(data: Path) -> None:
    flip_image(data, 7)
    prepared = open_prepared(data)
    views = StoredLatents(folder_of(data, FACTS)).views
    message = r"image 7 of .*data cannot be encoded: the bytes of image 7 in .*parquet-00000-of-00002 have changed"
    with pytest.raises(ValueError, match=message):
        list(view_batches(prepared, views, (16, 16), 1, np.arange(24), 8))


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(images={"files": 3, "rows_a_file": 9}), "a file of images does not have 9 rows"),
        (lambda x: x.update(images={"files": 2, "rows_a_file": 10}), "the files of images have 20 rows in all instead"),
        (
            lambda x: x.update(images={"files": 10**12, "rows_a_file": 10}),
            r"encoding.json: images.files: input should b",
        ),
        (lambda x: x.update(images=[], captions={}), r"images: .*; captions.files: field required"),
        (
            lambda x: x["facts"]["views"][0].update(flip=True),
            "the facts in encoding.json do not match the name of the folder",
        ),
        (lambda x: x["facts"].update(views=[]), r"facts.views: list should have at least 1 item"),
        (lambda x: x["facts"].update(resolution=-1), r"facts.resolution: input should be greater"),
        (lambda x: x.update(captions_checksum="0" * 32), "captions.arrow has another checksum"),
        (lambda x: x.clear(), "facts: field required; captions: field required"),
        (lambda x: x.pop("images"), "does not say how many files of images there are"),
        (lambda x: x["facts"].update(buckets="16x"), "facts.buckets: string should match pattern"),
        (
            lambda x: x["facts"].update(buckets="24x16"),
            "the facts in encoding.json do not match the name of the folder",
        ),
    ],
)
def test_what_encodings_say_of_themselves(data: Path, change: Callable[[Any], object], message: str) -> None:
    change_json(folder_of(data, FACTS) / "encoding.json", change)
    with pytest.raises(ValueError, match=rf"the stored latents in .* are damaged \(.*{message}.*; repair") as error:
        latents.open_latents(data, FACTS)
    assert len(str(error.value)) < 800


def test_verify(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    found = verify(data, lambda done, total: told.append((done, total)))
    assert str(found) == f"verified {found.files} files, {found.bytes:,} bytes, 24 images in {data}"
    assert told[-1] == (found.bytes, found.bytes)
    before = (data / "checksums.json").read_bytes()

    (data / "checksums.json").unlink()  # as prepared by an earlier version
    warn.cache_clear()
    open_prepared(data)
    assert f"add them with python -m dpo_jax.prepare --verify --output={data}\n" in capsys.readouterr().err
    assert "it had no checksums: they were written to" in str(verify(data))
    added, stored = (json.loads(content)["xxh3_128"] for content in ((data / "checksums.json").read_bytes(), before))
    assert added == {name: stored[name] for name in added}
    open_prepared(data)
    assert capsys.readouterr().err.count("without checksums") <= 1

    (data / "checksums.json").unlink()
    flip_image(data, 20)
    with pytest.raises(
        ValueError, match=r"damaged \(1 in all\): the bytes of image 20 in .*00001-of-00002 have changed"
    ):
        verify(data)
    assert not (data / "checksums.json").exists()


def test_verify_names_all_that_is_damaged(data: Path) -> None:
    flip_image(data, 3)
    shard = sorted((data / "images").glob("*parquet*"))[1]
    flip(shard, shard.stat().st_size - 20)  # only other readers read these bytes
    folder = folder_of(data, FACTS)
    texts = folder / "captions-00001.safetensors"
    flip(texts, safetensors_file.locate(epath.Path(texts))["context"][0])
    scores = data / "scores" / "mine.arrow"
    flip(scores, scores.read_bytes().index(np.arange(4, dtype=np.float32).tobytes()) + 5)
    with pytest.raises(ValueError, match=r"data is damaged \(5 in all\): ") as error:
        verify(data)
    for part in (
        f"{data}/images/{shard.name.replace('00001-of', '00000-of')} (its checksum is not the one in checksums.json)",
        f"{shard} (its checksum is not the one in checksums.json)",
        "the bytes of image 3 in ",
        f"row 0 of context in {texts} has changed",
        f"{scores} is damaged (the checksum of its scores differs)",
    ):
        assert part in str(error.value)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing or damaged"):
        verify(data)


def test_tables_that_have_changed_are_refused(data: Path) -> None:
    digest = open_prepared(data).sha256_I[3].as_py()
    for name, part in (
        ("records.arrow", b"prompt 3"),
        ("images.arrow", digest),
        ("images/dataset_info.json", b"Images"),
    ):
        content = (data / name).read_bytes()
        flip(data / name, content.index(part))
        message = rf"{name} is damaged \(its checksum is not the one in checksums.json\); prepare it again"
        with pytest.raises(ValueError, match=message):
            open_prepared(data)
        (data / name).write_bytes(content)
    change_json(data / "checksums.json", lambda x: x["xxh3_128"].pop("records.arrow"))
    with pytest.raises(ValueError, match=r"checksums.json is damaged \(it does not list records.arrow\)"):
        open_prepared(data)
    change_json(data / "checksums.json", lambda x: x["xxh3_128"].update({"../../etc/passwd": "0"}))
    with pytest.raises(ValueError, match=r"checksums.json: xxh3_128.../../etc/passwd"):
        open_prepared(data)


def test_what_has_no_checksums_still_opens(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Encodings and scores of an earlier version have no checksums."""
    folder = folder_of(data, FACTS)
    change_json(folder / "encoding.json", lambda x: x.pop("captions_checksum"))
    for file in folder.glob("*.safetensors"):
        tensors = {name: np.array(tensor) for name, tensor in safetensors_file.read(epath.Path(file)).items()}
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(latents.CHECKSUM)}
        header = {name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()}
        file.unlink()
        safetensors_file.write(epath.Path(file), kept.items(), header)
    scores = data / "scores" / "mine.arrow"
    with pa.ipc.open_file(scores.read_bytes()) as reader:
        table = reader.read_all()
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"scores_xxh3"}
    table = table.replace_schema_metadata(metadata)
    with pa.ipc.new_file(str(scores), table.schema) as writer:
        writer.write_table(table)
    assert not latents.open_latents(data, FACTS).has_checksums
    epoch(data, "encodings", judges=("mine",))
    said = capsys.readouterr().err
    for path in (folder, scores):
        assert said.count(f"warning: {path} has no checksum") == 1
    assert verify(data).without == [str(folder), str(scores)]
    of = candidates(open_prepared(data).records["images"])
    np.testing.assert_array_equal(read_scores(data, ["mine"], of)[0], np.arange(2 * PAIRS))
