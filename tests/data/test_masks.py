"""Masks beside images, from the user's files to the weights of latent cells in a batch."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_jax.data.load.inputs import CachedInputs, RawInputs, ViewDraws
from dpo_jax.data.load.pipeline import make_iterator, validation_batches
from dpo_jax.data.load.records import Relabelled, open_records
from dpo_jax.data.load.votes import Votes
from dpo_jax.data.prepare import worker
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import SOURCES, Damaged, Record
from dpo_jax.data.store.prepared import OPTIONAL, RECORDS, open_prepared
from dpo_jax.data.store.scores import candidates, write_scores
from dpo_jax.errors import UserError
from dpo_jax.training.data import _say_masks

from .conftest import bytes_of, encode, write_prepared
from .source_files import read, write_images, write_lines
from .test_pipeline import spell

MASKED = pa.schema([*RECORDS, OPTIONAL[1]])


def grey(pixels_HW: np.ndarray) -> bytes:
    return encode(pixels_HW.astype(np.uint8), "PNG")


def write_csv(file: Path, *rows: dict[str, Any]) -> Path:
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LIST = {"prompt": "p", "images": ["a", "b"], "preferred": 1}
COLUMNS = {"prompt": "p", "image_0": "a", "image_1": "b", "preferred": "1"}


@pytest.mark.parametrize(
    ("name", "row", "masks"),
    [
        ("jsonl", PAIR | {"chosen_mask": "m"}, (b"m", None)),
        ("jsonl", LIST | {"masks": ["m", None]}, (None, b"m")),
        ("jsonl", LIST | {"masks": None}, None),
        ("csv", PAIR | {"chosen_mask": "", "rejected_mask": "m"}, (None, b"m")),
        ("csv", COLUMNS | {"mask_0": "m", "mask_1": "n"}, (b"n", b"m")),
        ("csv", COLUMNS | {"mask_0": "", "mask_1": ""}, None),
    ],
)
def test_sources_read_masks_best_first(tmp_path: Path, name: str, row: dict[str, Any], masks: Any) -> None:
    write_images(tmp_path, "a", "b", "m", "n")
    file = (write_csv if name == "csv" else write_lines)(tmp_path / f"pairs.{name}", row)
    (found,) = read(name, file)
    assert isinstance(found, Record)
    assert found.masks == masks


@pytest.mark.parametrize(
    ("masks", "reason", "told"),
    [
        (["m", "absent"], "a mask: no image", "there is no "),
        (["m", 3], "a mask: an image's path is not text", "3"),
        (["m"], '"masks" is not a list with a path or null for each image', "['m']"),
        ("m", '"masks" is not a list with a path or null for each image', "'m'"),
    ],
)
def test_masks_that_cannot_be_read_are_told(tmp_path: Path, masks: Any, reason: str, told: str) -> None:
    write_images(tmp_path, "a", "b", "m")
    (found,) = read("jsonl", write_lines(tmp_path / "pairs.jsonl", LIST | {"masks": masks}))
    assert isinstance(found, Damaged)
    assert found.reason == reason
    assert told in found.found


ROWS, COLUMNS_OF = np.mgrid[:32, :40]
WHITE, LEFT = grey(255 + 0 * ROWS), grey(255 * (COLUMNS_OF < 20))


def images(number: int) -> list[bytes]:
    return [grey(ROWS + 100 + candidate + 2 * number) for candidate in (0, 1)]


def write_pairs(folder: Path, name: str, first: int, *masks: list[bytes | None]) -> Path:
    """Write a JSONL file of pairs whose second image is preferred, and the files that it names."""
    rows = []
    for number, of_pair in enumerate(masks, start=first):
        files = {f"{number}_{k}.png": data for k, data in enumerate(images(number))}
        files |= {f"{number}_{k}_mask.png": data for k, data in enumerate(of_pair) if data is not None}
        for file, data in files.items():
            (folder / file).write_bytes(data)
        named = [f"{number}_{k}_mask.png" if data is not None else None for k, data in enumerate(of_pair)]
        row = {"prompt": f"prompt {number}", "images": list(files)[:2], "preferred": 1}
        rows.append(row | ({"masks": named} if any(named) else {}))
    return write_lines(folder / name, *rows)


def prepared(folder: Path, *files: Path, name: str = "out") -> Path:
    options: dict[str, Any] = {"workers": 0, "validation_fraction": 0.0, "max_damaged_fraction": 1.0}
    prepare(SOURCES["jsonl"], files, folder / name, **options)
    return folder / name


def test_prepare_stores_masks_like_images(tmp_path: Path) -> None:
    masked = write_pairs(tmp_path, "masked.jsonl", 0, [WHITE, LEFT], [None, WHITE], [None, None])
    plain = write_pairs(tmp_path, "plain.jsonl", 10, [None, None], [None, None])
    data = open_prepared(prepared(tmp_path, plain, masked))

    assert data.records.schema == MASKED
    assert data.records["masks"].to_pylist()[:2] == [[-1, -1], [-1, -1]]
    rows = data.records.to_pylist()[2:]
    stored = [[None if at < 0 else bytes(data.images[at]) for at in row["masks"]] for row in rows]
    assert stored == [[LEFT, WHITE], [WHITE, None], [None, None]]
    assert [data.read_images(row) for row in rows] == [images(number)[::-1] for number in range(3)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["masked"], summary["images"], summary["duplicates"]) == (2, 12, 1)
    assert open_prepared(prepared(tmp_path, plain, name="plain")).records.schema == RECORDS


def test_a_mask_that_does_not_fit_is_set_aside(tmp_path: Path) -> None:
    small, black, broken = grey(ROWS[:16] + 1), grey(0 * ROWS), WHITE[:60]
    turned = encode(
        np.full((40, 32), 255, np.uint8), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    )
    file = write_pairs(tmp_path, "a.jsonl", 0, [small, None], [None, black], [WHITE, broken], [turned, WHITE])
    folder = prepared(tmp_path, file)
    told = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [row["candidate"] for row in told] == [1, 0, 0]
    reasons = [row["reason"] for row in told]
    assert reasons[:2] == ["a mask: its size is not that of its image", "a mask: it is black everywhere"]
    assert reasons[2].startswith("a mask: ")
    assert [record["where"] for record in open_prepared(folder).records.to_pylist()] == [f"{file} row 3"]


def test_parts_of_earlier_versions_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_pairs(tmp_path, "a.jsonl", 0, [None, None]), write_pairs(tmp_path, "b.jsonl", 1, [None, WHITE])]
    new, make_part = worker.RECORDS, worker.make_part
    prepared(tmp_path, *files, name="new")

    def by_an_earlier_version(source: Any, chunk: Any, folder: Path) -> None:
        is_earlier = chunk.file == files[0]
        monkeypatch.setattr(worker, "RECORDS", new.remove(new.get_field_index("masks")) if is_earlier else new)
        make_part(source, chunk, folder)

    monkeypatch.setattr(worker, "make_part", by_an_earlier_version)
    prepared(tmp_path, *files, name="mixed")
    assert bytes_of(tmp_path / "mixed") == bytes_of(tmp_path / "new")


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Pairs of which the second is the better one; the first has no mask, the second shows the left half."""
    return prepared(tmp_path, write_pairs(tmp_path, "a.jsonl", 0, [None, LEFT], [WHITE, LEFT], [None, None]))


def test_masks_stay_with_their_images(masked: Path) -> None:
    records = open_records(masked, "train", masks=True)
    white, left = ({bytes(records.read_images({"images": [at]})[0]): at for at in range(8)}[m] for m in (WHITE, LEFT))
    assert [records[i]["masks"] for i in range(3)] == [[left, -1], [left, white], [-1, -1]]
    assert [Relabelled(records, None)[i]["masks"] for i in range(2)] == [[-1, left], [white, left]]
    assert [Votes(records)[i]["masks"] for i in range(4)] == [[left], [-1], [left], [white]]
    assert "masks" not in open_records(masked, "train")[0]
    of = candidates(open_prepared(masked).records["images"])
    write_scores(masked, "a", "by hand", np.float32([0, 1] * 3), of, {})
    judged = open_records(masked, "train", judges=("a",), masks=True)
    assert [judged[i]["masks"] for i in range(2)] == [[-1, left], [white, left]]


def test_a_run_says_how_many_records_have_a_mask(masked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, used in ((0, True), (1, False)):
        _say_masks(open_records(masked, "train", limit=limit), used)
    assert capsys.readouterr().out == (
        "masks: 2 of 3 records have one\nmasks: 1 of 1 records have one, which only data.masks=True uses\n"
    )


def test_masks_that_are_absent_are_told(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "data", [{"caption": "p", "images": images(0)}])
    _say_masks(open_records(folder, "train"), False)
    with pytest.raises(UserError, match=r"data.masks=True, but no image of .*data has a mask. Set data.masks=False"):
        open_records(folder, "train", masks=True)
    with pytest.raises(UserError, match="random pairs have no masks"):
        open_records("random:2", "train", masks=True)


def by_area(images_HWC: np.ndarray, cells: int) -> np.ndarray:
    height, width = (side // cells for side in images_HWC.shape[:2])
    return images_HWC.mean(axis=-1).reshape(cells, height, cells, width).mean(axis=(1, 3))


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_masks_are_cropped_and_mirrored_with_their_images(tmp_path: Path, floor: float) -> None:
    """Each image is its own mask, so the image that the step sees tells the weights of its latent cells."""
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        shape = (48, 80) if number % 2 else (75, 30)
        for k in (0, 1):
            (tmp_path / f"{number}_{k}.png").write_bytes(grey(rng.integers(0, 256, shape)))
        names = [f"{number}_0.png", f"{number}_1.png"]
        rows.append({"prompt": f"{number}", "images": names, "masks": [names[0], None], "preferred": 0})
    records = open_records(prepared(tmp_path, write_lines(tmp_path / "a.jsonl", *rows)), "train", masks=True)
    inputs = RawInputs(24, spell, random_crop=True, random_flip=True, pixels_a_cell=4)
    with make_iterator(records, inputs, batch_size=12, seed=0, mask_floor=floor) as batches:
        batch = next(batches)
    assert len(np.unique(batch.inputs.mirrored_BK[:, 0])) == 2
    for b in range(12):
        image_HWC = batch.inputs.images_BKHWC[b, 0].astype(np.float64) / 255
        expected = by_area(image_HWC[:, ::-1] if batch.inputs.mirrored_BK[b, 0] else image_HWC, 6)
        expected = floor + (1 - floor) * expected
        np.testing.assert_allclose(batch.cell_weight_BKhw[b, 0], expected / expected.mean(), rtol=1e-6)
    np.testing.assert_array_equal(batch.cell_weight_BKhw[:, 1], np.ones((12, 6, 6)))
    np.testing.assert_array_equal(batch.weight_B, np.ones(12))


def test_a_mask_that_is_black_in_the_crop_gives_weight_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edge = grey(255 * (COLUMNS_OF < 2))
    folder = prepared(tmp_path, write_pairs(tmp_path, "a.jsonl", 0, [None, LEFT], [WHITE, edge], [edge, edge]))
    records = open_records(folder, "train", masks=True)

    def batch(floor: float) -> Any:
        return next(validation_batches(records, RawInputs(16, spell, pixels_a_cell=4), batch_size=3, mask_floor=floor))

    capsys.readouterr()
    found = batch(0.0)
    np.testing.assert_array_equal(found.weight_B, [1, 0, 0])
    np.testing.assert_array_equal(found.cell_weight_BKhw[1:], np.ones((2, 2, 4, 4)))
    told = capsys.readouterr().err
    assert (
        told.count("a mask is black in the part that is cut out, so it has weight 0 there. This is so for 1 of 3") == 1
    )
    assert told.count("weight 0") == 1
    even = batch(0.5)
    np.testing.assert_array_equal(even.weight_B, np.ones(3))
    np.testing.assert_array_equal(even.cell_weight_BKhw[1:], np.ones((2, 2, 4, 4)))
    assert capsys.readouterr().err == ""


def test_a_damaged_image_leaves_even_weights(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_jax.data import images as reader

    records = open_records(masked, "train", masks=True)
    mask, read_image = bytes(records.read_images({"images": [records[1]["masks"][1]]})[0]), reader.read

    def read_damaged(data: Any, view: Any, square_HWC: np.ndarray) -> Any:
        if bytes(data) == mask:
            raise reader.DamagedImage("broken")
        return read_image(data, view, square_HWC)

    monkeypatch.setattr(reader, "read", read_damaged)
    batches = validation_batches(records, RawInputs(16, spell, pixels_a_cell=4), batch_size=3, mask_floor=0.0)
    batch = next(batches)
    np.testing.assert_array_equal(batch.weight_B, [1, 0, 1])
    np.testing.assert_array_equal(batch.cell_weight_BKhw[1], np.ones((2, 4, 4)))
    assert batches.damaged == {1}


def test_stored_latents_have_the_views_of_images() -> None:
    view = RawInputs(16, spell, random_flip=True).view
    views = [view(ViewDraws(0, 0, flip)) for flip in (0.9, 0.1)]
    stored: Any = SimpleNamespace(views=views, shapes=[(16, 16)], moments_shape=lambda shape: (2, 2, 8))
    cached = CachedInputs(stored)
    assert cached.pixels_a_cell == RawInputs(16, spell).pixels_a_cell == 8
    for flip in (0.0, 0.4, 0.6, 0.99):
        draws = ViewDraws(0.5, 0.5, flip)
        assert cached.view(draws) == view(draws)
    assert cached.view(None) == views[0]


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ([[0, 9]], "masks has one that images.arrow lacks"),
        ([[0]], "masks does not have one entry per image"),
        ([[0, None]], "masks has a null entry"),
    ],
)
def test_damaged_masks_are_told(tmp_path: Path, masks: Any, told: str) -> None:
    folder = write_prepared(tmp_path / "data", [{"caption": "p", "images": images(0)}])
    file = str(folder / "records.arrow")
    table = pa.ipc.open_file(file).read_all().append_column(OPTIONAL[1], pa.array(masks, OPTIONAL[1].type))
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=told):
        open_prepared(folder)
