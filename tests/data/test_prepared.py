import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_jax.data.prepared import Prepared, open_prepared, select

from .conftest import encode, write_prepared


def image(seed: int, height: int = 16, width: int = 24) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), "PNG")


RECORDS: list[dict[str, Any]] = [
    {"caption": "clear", "images": [image(0), image(1)], "models": ["sd 1.4", "dreamlike"]},
    {"caption": "both dreamlike", "images": [image(2), image(3, 32, 20)], "models": ["dreamlike 1", "dreamlike 2"]},
    {"caption": "tie", "images": [image(4), image(0)], "preference": [0.5, 0.5]},
    {"caption": "0.7", "images": [image(5, 40, 40), image(6, 48, 32)], "preference": [0.7, 0.3]},
    {"caption": "held out", "images": [image(7), image(8)], "split": "validation"},
    {"caption": "single", "images": [image(9)], "preference": [0.0]},
    {
        "caption": "four",
        "images": [image(10, 50, 50), image(11, 10, 10), image(12, 9, 9), image(13, 60, 60)],
        "preference": [0.4, 0.3, 0.2, 0.1],
        "models": ["dreamlike", "sd 1.4", "", "dreamlike"],
        "captions": ["1", "2", "3", "4"],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared") / "out", RECORDS)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def chosen(folder: Path, **choice: Any) -> list[str]:
    indices = select(open_prepared(folder), **{"split": "train", **choice})
    return [RECORDS[i]["caption"] for i in indices]


def test_records_as_they_were_written(folder: Path) -> None:
    prepared = open_prepared(folder)
    assert (len(prepared), len(prepared.images)) == (len(RECORDS), 14)  # one image is in two records
    for i, expected in enumerate(RECORDS):
        record = prepared.record(i)
        for name in ("caption", "images"):
            assert record[name] == expected[name]
        assert record["captions"] == expected.get("captions")
        assert record["models"] == expected.get("models", [""] * len(record["images"]))
        assert record["where"] == f"made row {i}"
        if "preference" in expected:
            np.testing.assert_array_equal(record["preference"], np.asarray(expected["preference"], np.float32))
    np.testing.assert_array_equal(prepared.record(3)["sizes"], [[40, 40], [48, 32]])


def test_best_and_worst_of_more_candidates(folder: Path) -> None:
    record = open_prepared(folder).record(6, num_candidates=3)
    assert record["images"] == [RECORDS[6]["images"][rank] for rank in (0, 1, 3)]
    assert (record["models"], record["captions"]) == (["dreamlike", "sd 1.4", "dreamlike"], ["1", "2", "4"])
    np.testing.assert_array_equal(record["sizes"], [[50, 50], [10, 10], [60, 60]])
    np.testing.assert_allclose(record["preference"], [0.5, 0.375, 0.125], rtol=1e-6)


def test_pickled_as_its_folder(folder: Path) -> None:
    prepared = open_prepared(folder)
    data = pickle.dumps(prepared)
    assert len(data) < 1000
    assert pickle.loads(data).record(1)["images"] == prepared.record(1)["images"]


@pytest.mark.parametrize(
    ("choice", "captions"),
    [
        ({}, ["clear", "both dreamlike", "0.7", "four"]),
        ({"split": "validation"}, ["held out"]),
        ({"ties": "soft"}, ["clear", "both dreamlike", "tie", "0.7", "four"]),
        ({"ties": "zero_weight"}, ["clear", "both dreamlike", "tie", "0.7", "four"]),
        ({"generators": ("dream",)}, ["both dreamlike", "four"]),
        ({"generators": ("^dream", "1.4$")}, ["clear", "both dreamlike", "four"]),
        ({"generators": ("dream",), "num_candidates": 4}, ["both dreamlike"]),
        ({"min_agreement": 0.7}, ["clear", "both dreamlike", "0.7", "four"]),
        ({"min_agreement": 0.7, "num_candidates": 4}, ["clear", "both dreamlike", "0.7", "four"]),
        ({"min_agreement": 0.71}, ["clear", "both dreamlike", "four"]),
        ({"min_agreement": 0.81}, ["clear", "both dreamlike"]),
        ({"min_agreement": 0.5, "ties": "soft"}, ["clear", "both dreamlike", "tie", "0.7", "four"]),
        ({"min_side": 16}, ["clear", "both dreamlike", "0.7", "four"]),
        ({"min_side": 17}, ["0.7", "four"]),
        ({"min_side": 17, "num_candidates": 3}, ["0.7"]),
        ({"min_side": 32}, ["0.7", "four"]),
        ({"min_side": 33}, ["four"]),
        ({"num_candidates": 1}, ["clear", "both dreamlike", "0.7", "single", "four"]),
        ({"num_candidates": 1, "min_agreement": 0.9}, ["clear", "both dreamlike", "single"]),
        ({"limit": 2}, ["clear", "both dreamlike"]),
        ({"limit": 20, "min_side": 17}, ["0.7", "four"]),
    ],
)
def test_select(folder: Path, choice: dict[str, Any], captions: list[str]) -> None:
    assert chosen(folder, **choice) == captions


def test_nothing_left_tells_what_each_filter_left(folder: Path, tmp_path: Path) -> None:
    message = (
        r"nothing is left of .*: 6 in the split train, then 5 with several images, then 4 without ties, "
        r"then 2 generated by dream or flux, then 2 with an agreement of 0.6, then 0 of 999 pixels; loosen the choice"
    )
    with pytest.raises(ValueError, match=message):
        chosen(folder, generators=("dream", "flux"), min_agreement=0.6, min_side=999)
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        chosen(folder, split="test")
    with pytest.raises(ValueError, match=r"generators=\('sd', '\('\): '\(' is no regular expression"):
        chosen(folder, generators=("sd", "("))
    ties = write_prepared(tmp_path / "ties", [RECORDS[2]])
    with pytest.raises(ValueError, match="nothing but ties is left of"):
        chosen(ties, ties="zero_weight")
    assert len(select(open_prepared(ties), split="train", ties="soft")) == 1


def test_nothing_prepared(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prepared data set at .*: run python -m dpo_jax.prepare"):
        open_prepared(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(ValueError, match="by an earlier version of dpo_jax; prepare it again"):
        open_prepared(tmp_path)


@pytest.mark.parametrize("name", ["images.arrow", "images/dataset_info.json"])
def test_a_part_is_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"misses {name}; prepare it again"):
        open_prepared(copy)


@pytest.mark.parametrize(
    "name", ["records.arrow", "images.arrow", "images/preference_images-images.array_record-00001"]
)
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(copy: Path, name: str, share: float) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is .*damaged .*; prepare it again") as error:
        open_prepared(copy)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_together(copy: Path, tmp_path: Path) -> None:
    other = write_prepared(tmp_path / "other", RECORDS[:2])
    shutil.copy(other / "images.arrow", copy)
    with pytest.raises(ValueError, match=r"holds 14 images, but images.arrow lists 4; prepare"):
        open_prepared(copy)
    shutil.copy(copy / "records.arrow", other)
    with pytest.raises(ValueError, match=r"refers to images that images.arrow doesn't list; prepare"):
        open_prepared(other)
    shard = "images/preference_images-images.array_record-0000"
    shutil.copy(copy / f"{shard}2", copy / f"{shard}0")
    with pytest.raises(ValueError, match="0 holds 4 images instead of 5; prepare"):
        open_prepared(copy)
    shutil.copy(other / "images.arrow", other / "records.arrow")
    with pytest.raises(ValueError, match=r"records.arrow has another layout.*; prepare"):
        open_prepared(other)


def test_selects_from_851293_records_in_a_second(tmp_path: Path) -> None:
    """As many pairs as Pick-a-Pic has, without images: only the tables are read."""
    number, rng = 851_293, np.random.default_rng(0)
    offsets = pa.array(np.arange(0, 2 * number + 1, 2), pa.int32())

    def of_pairs(values: Any, type: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values, type))

    best = rng.choice([0.5, 1.0], number, p=[0.2, 0.8])
    models = pa.DictionaryArray.from_arrays(rng.integers(0, 4, 2 * number), ["sd", "xl", "dreamlike", ""])
    records = pa.table(
        {
            "caption": pa.array(np.full(number, "a prompt of some length, trending on nothing at all")),
            "captions": pa.nulls(number, pa.list_(pa.string())),
            "images": of_pairs(rng.permutation(2 * number), pa.int32()),
            "preference": of_pairs(np.stack([best, 1 - best], 1).ravel(), pa.float32()),
            "models": of_pairs(models.cast(pa.string()), pa.string()),
            "split": pa.array(np.where(rng.random(number) < 0.05, "validation", "train")),
            "where": pa.array(np.full(number, "train-00000-of-00341.parquet row 100")),
        }
    )
    sides = pa.array(rng.choice([512, 768], 2 * number), pa.int32())
    images = pa.table({"sha256": pa.array([b""] * (2 * number), pa.binary()), "width": sides, "height": sides})
    for name, table in (("records", records), ("images", images)):
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=10_000)
    start = time.perf_counter()
    kept = select(Prepared(tmp_path), split="train", generators=("sd", "xl"), min_agreement=0.6, min_side=768)
    assert time.perf_counter() - start < 3  # 0.3 s on an idle core
    assert len(kept) == pytest.approx(number * 0.95 * 0.8 / 4 / 4, rel=0.02)
