import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from dpo_jax.data.pipeline import open_pairs
from dpo_jax.data.prepared import Combine, Prepared, image_of_example, open_prepared, select
from dpo_jax.data.scores import candidates, write_scores

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


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_prepared(tmp_path_factory.mktemp("judged") / "out", RECORDS)
    of = candidates(open_prepared(folder).records["images"])
    scores = {
        "a": [[1, 2], [3, 3], [1, 0], [0.1, 0.2], [0, 1], [1], [2, 4, 1, 3]],
        "b": [[1, 2], [np.nan] * 2, [1, 0], [np.nan] * 2, [0, 1], [1], [3, 2, 1, 0]],
    }
    for judge, rows in scores.items():
        write_scores(folder, judge, "by hand", np.concatenate(rows).astype(np.float32), of, {})
    return folder


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
        assert (record["caption"], prepared.read_images(record)) == (expected["caption"], expected["images"])
        assert record["captions"] == expected.get("captions")
        assert record["models"] == expected.get("models", [""] * len(record["images"]))
        assert record["where"] == f"made row {i}"
        if "preference" in expected:
            np.testing.assert_array_equal(record["preference"], np.asarray(expected["preference"], np.float32))
    np.testing.assert_array_equal(prepared.record(3)["sizes"], [[40, 40], [48, 32]])


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_000, 16_383, 16_384, 2_100_000])
def test_the_image_in_a_serialised_example(size: int) -> None:
    image = np.random.default_rng(size).bytes(size)
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    assert image_of_example(example.SerializeToString()) == image


def test_a_stored_image_is_damaged() -> None:
    with pytest.raises(ValueError, match="a stored image is damaged; prepare it again"):
        image_of_example(b"no example")


def test_best_and_worst_of_more_candidates(folder: Path) -> None:
    prepared = open_prepared(folder)
    record = prepared.record(6, num_candidates=3)
    assert prepared.read_images(record) == [RECORDS[6]["images"][rank] for rank in (0, 1, 3)]
    assert (record["models"], record["captions"]) == (["dreamlike", "sd 1.4", "dreamlike"], ["1", "2", "4"])
    np.testing.assert_array_equal(record["sizes"], [[50, 50], [10, 10], [60, 60]])
    np.testing.assert_allclose(record["preference"], [0.5, 0.375, 0.125], rtol=1e-6)


def test_selects_by_the_scores_of_judges(judged: Path) -> None:
    def chosen_by(*judges: str, **choice: Any) -> list[str]:
        indices = select(open_prepared(judged, judges), **{"split": "train", **choice})
        return [RECORDS[i]["caption"] for i in indices]

    assert chosen_by("a") == ["clear", "tie", "0.7", "four"]  # this judge finds another tie, and decides a voters' one
    assert chosen_by("a", ties="soft") == ["clear", "both dreamlike", "tie", "0.7", "four"]
    assert chosen_by("b") == ["clear", "tie", "four"]
    assert chosen_by("a", "b", ties="soft") == ["clear", "tie", "four"]
    # The judge's best and worst of "four" are generated by "sd 1.4" and dreamlike, 10 and 9 pixels high.
    assert chosen_by("a", generators=("dream",), ties="soft") == ["both dreamlike"]
    assert chosen_by("a", min_side=17) == ["0.7"]
    assert chosen_by("b", min_side=17) == ["four"]
    message = (
        r"6 in the split train, then 4 with scores by a and b, then 3 with several images, then 3 without ties, then"
    )
    with pytest.raises(ValueError, match=f"nothing is left of .*: {message} 0 of 999 pixels"):
        chosen_by("a", "b", min_side=999)
    with pytest.raises(ValueError, match=r"min_agreement=0.7 is a share of the votes, which scores by a do not state"):
        chosen_by("a", min_agreement=0.7)


def test_training_pairs_of_judges(judged: Path) -> None:
    pairs = open_pairs(judged, "train", judges=("b",), limit=2)
    assert [pairs.read_images(pairs[i]) for i in range(2)] == [RECORDS[0]["images"][::-1], RECORDS[2]["images"]]
    pairs = open_pairs(judged, "validation", judges=("a",))
    assert len(pairs) == 1
    held_out = pairs[0]
    assert pairs.read_images(held_out) == RECORDS[4]["images"][::-1]
    np.testing.assert_array_equal(held_out["preference"], [1, 0])
    with pytest.raises(ValueError, match=r"labels='soft' are shares of the votes, which scores by a, b do not state"):
        open_pairs(judged, "train", labels="soft", judges=("a", "b"))
    with pytest.raises(ValueError, match="combine='median'"):
        open_pairs(judged, "train", judges=("a", "b"), combine="median")  # type: ignore[arg-type]


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


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pairs as Pick-a-Pic has, without images."""
    folder = tmp_path_factory.mktemp("many")
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
        with pa.ipc.new_file(str(folder / f"{name}.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=10_000)
    of = candidates(records["images"])
    for judge in "abc":
        scores_M = rng.normal(size=2 * number).astype(np.float32)
        write_scores(
            folder, judge, "made", np.where(rng.random(number) < 0.9, 0, np.nan)[of.record_M] + scores_M, of, {}
        )
    return folder


def test_selects_from_851293_records_in_a_second(many: Path) -> None:
    start = time.perf_counter()
    prepared = Prepared(many)
    kept = select(prepared, split="train", generators=("sd", "xl"), min_agreement=0.6, min_side=768)
    assert time.perf_counter() - start < 3  # 0.3 s on an idle core
    assert len(kept) == pytest.approx(len(prepared) * 0.95 * 0.8 / 4 / 4, rel=0.02)


@pytest.mark.parametrize("combine", ["mean", "pareto"])
def test_three_judges_of_851293_records(many: Path, combine: Combine) -> None:
    start = time.perf_counter()
    prepared = Prepared(many, ("a", "b", "c"), combine)
    kept = select(prepared, split="train")
    assert time.perf_counter() - start < 6
    decided = 1.0 if combine == "mean" else 1 / 4
    assert len(kept) == pytest.approx(len(prepared) * 0.95 * 0.9**3 * decided, rel=0.02)
