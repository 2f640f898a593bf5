"""A prepared data set from somebody else: it starts no code, and nothing is written outside of its folder."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds

from dpo_jax.data.images import DamagedImage
from dpo_jax.data.load.records import open_records
from dpo_jax.data.store.image_store import FEATURES_JSON, MAX_SHARDS, features
from dpo_jax.data.store.prepared import RECORDS as SCHEMA
from dpo_jax.data.store.prepared import PreparedData, open_prepared
from dpo_jax.data.store.scores import candidates, write_scores

from ..conftest import Command
from .conftest import noise_jpeg, write_prepared

Change = Callable[[Any], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [{"caption": f"prompt {i}", "images": [noise_jpeg(2 * i), noise_jpeg(2 * i + 1)]} for i in range(4)]
    return write_prepared(tmp_path / "data", records)


def change_json(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_table(file: Path, **columns: Any) -> None:
    with pa.ipc.open_file(file.read_bytes()) as reader:
        table = reader.read_all()
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def test_the_classes_it_names_are_not_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Any], command: Command
) -> None:
    """Tests training and scoring, and first shows that TFDS itself imports the module, which leaves the marker."""
    from dpo_jax.training.data import check_data

    marker = tmp_path / "marker"
    (folder / "images" / "strangers_code.py").write_text(
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
        "from tensorflow_datasets.core.features.features_dict import FeaturesDict as Mine\n"
    )
    monkeypatch.syspath_prepend(folder / "images")

    def rename(features: dict[str, Any]) -> None:
        features["pythonClassName"] = "strangers_code.Mine"

    change_json(folder / "images" / "features.json", rename)
    message = r"features.json is not what dpo_jax writes there, and such a file can name code to run; prepare it again"
    with pytest.raises(ValueError, match=message):
        open_prepared(folder)
    with pytest.raises(ValueError, match=message):
        open_records(folder, "train")
    with pytest.raises(ValueError, match=message):
        check_data(tiny_config("sd15", **{"data.path": str(folder)}))
    scored = command("score", f"--data={folder}", "--judge=shapes")
    assert scored.returncode == 1
    assert re.search(message, scored.stderr)
    assert not marker.exists()
    assert "strangers_code" not in sys.modules
    with pytest.raises(ValueError, match="Unrecognized FeatureConnector type"):
        tfds.builder_from_directory(folder / "images")
    assert marker.exists()
    monkeypatch.delitem(sys.modules, "strangers_code")


def test_what_tfds_writes_is_what_is_expected(tmp_path: Path) -> None:
    features().save_config(tmp_path)
    assert json.loads((tmp_path / "features.json").read_text()) == FEATURES_JSON


def split_of(info: dict[str, Any]) -> dict[str, Any]:
    return info["splits"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(name="../other"), "name: input should be 'preference_images', not '../other'"),
        (lambda info: info.update(fileFormat="array_record"), "fileFormat: input should be 'parquet'"),
        (lambda info: split_of(info).update(name="../../x"), "splits.0.name: input should be 'images', not '../../x'"),
        (
            lambda info: split_of(info).update(filepathTemplate="/etc/passwd"),
            "splits.0.filepathTemplate: input should be",
        ),
        (lambda info: split_of(info).update(shardLengths=["-5", "3"]), "splits.0.shardLengths.0: string should match"),
        (lambda info: split_of(info).update(shardLengths=["1"] * (MAX_SHARDS + 1)), "should have at most 100000 items"),
        (lambda info: split_of(info).update(shardLengths=["9" * 30]), "splits.0.shardLengths.0: string should match"),
        (lambda info: info.update(splits=[]), "splits: list should have at least 1 item"),
        (lambda info: info.clear(), r"name: field required; fileFormat: field required; splits: field required"),
    ],
    ids=["name", "format", "split", "path", "negative", "many", "huge", "no split", "empty"],
)
def test_other_layouts(folder: Path, change: Change, message: str) -> None:
    change_json(folder / "images" / "dataset_info.json", change)
    with pytest.raises(ValueError, match=rf"images/dataset_info.json: .*{message}.*; prepare it again") as error:
        open_prepared(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"features.json is empty"),
        (b"{", r"features.json is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"features.json is a Git LFS pointer"),
        (b"\x80\x04\x95K", r"features.json is a Python pickle"),
    ],
)
def test_a_file_that_is_no_json(folder: Path, content: bytes, message: str) -> None:
    (folder / "images" / "features.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.*; prepare it again"):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["images.arrow", "records.arrow", "preference_images-images.parquet-00001-of-00002"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", r"is .*damaged \(it is a Git LFS pointer"),
        (b"<!DOCTYPE html>", r"is .*damaged \(it is a web page"),
        (b"", r"is .*damaged \(it is empty\)"),
    ],
)
def test_what_a_table_really_is(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / ("images" if "parquet" in name else "") / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {message}.*; prepare it again"):
        open_prepared(folder)


def test_a_device_in_place_of_a_table(folder: Path) -> None:
    (folder / "records.arrow").unlink()
    (folder / "records.arrow").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="no prepared data set at"):
        open_prepared(folder)
    shard = next((folder / "images").glob("*parquet*"))
    shard.unlink()
    shard.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is not a regular file"):
        PreparedData(folder).images.check()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a", None, "c", None]}, r"caption is null \(record 1 and 1 more\)"),
        (
            {"images": [[0, 1], [2, 9], [-1, 5], [6, 7]]},
            r"images has one that images.arrow lacks \(record 1 and 1 mor",
        ),
        (
            {"images": [[0, 1], [], [4, 5], [6, 7]]},
            r"images is empty \(record 1\); preference does not have one",
        ),
        ({"images": [[0, 1], None, [4, 5], [6, 7]]}, r"images is null \(record 1\)"),
        ({"images": [[0, 1], [2, 3], [4, None], [6, 7]]}, r"images has a null entry \(record 2\)"),
        ({"models": [["a"]] * 4}, r"models does not have one entry per image \(record 0 and 3 more\)"),
        ({"captions": [None, ["one"], None, None]}, r"captions does not have one entry per image \(record 1\)"),
        ({"captions": [None, ["one", None], None, None]}, r"captions has a null entry \(record 1\)"),
        ({"preference": [[1, 0], [np.nan, 0], [1, 0], [1, 0]]}, r"preference has an entry that is not between 0 and 1"),
        ({"preference": [[1, 0], [1, 0], [2, -1], [1, 0]]}, r"preference has an entry that .* \(record 2\)"),
        ({"preference": [[1, 0], [1, 0], [1, 0], [0.7, 0.7]]}, r"preference does not sum to 1 \(record 3\)"),
        ({"preference": [[0, 1], [1, 0], [1, 0], [1, 0]]}, r"preference is not sorted best first \(record 0\)"),
        (
            {"images": [[0, 1], [2, 99], [4, 5], [6, 7]], "preference": [[1, 0], [1, 0], [1, 1], [0, 1]]},
            r"images has one that images.arrow lacks \(record 1\); preference does not sum to 1 \(record 2\); "
            r"preference is not sorted best first \(record 3\)",
        ),
        ({"where": None, "split": None}, "where is null .*"),
    ],
)
def test_impossible_records(folder: Path, columns: dict[str, Any], message: str) -> None:
    change_table(folder / "records.arrow", **{k: [None] * 4 if v is None else v for k, v in columns.items()})
    with pytest.raises(ValueError, match=f"records.arrow: .*{message}.*; prepare it again") as error:
        open_prepared(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sha256": [b"short"] * 8}, r"images.arrow: sha256 does not have 32 bytes \(image 0 and 7 more\)"),
        ({"width": [0] * 8, "bytes": [-1] * 8}, r"images.arrow: width or height is below 1 .*; bytes is below 1"),
        ({"height": [2**31 - 1] * 8, "width": [2**31 - 1] * 8}, r"width x height is above 67108864"),
        ({"offset": [-1] * 8}, r"offset is negative"),
        ({"offset": [2**62] * 8}, r"damaged \(its last image ends at byte \d+, after its end\)"),
        ({"offset": [4] * 8}, r"the images of .* overlap in images.arrow"),
        ({"height": [None] * 8}, r"height is null"),
    ],
)
def test_impossible_images(folder: Path, columns: dict[str, Any], message: str) -> None:
    change_table(folder / "images.arrow", **columns)
    with pytest.raises(ValueError, match=f"{message}.*; prepare it again"):
        open_prepared(folder)


def test_no_records(folder: Path) -> None:
    with pa.ipc.new_file(str(folder / "records.arrow"), SCHEMA):
        pass
    with pytest.raises(ValueError, match=r"records.arrow holds no records; prepare it again"):
        open_prepared(folder)


def test_offsets_that_lead_out_of_the_file(folder: Path) -> None:
    """Reading such a table unchecked would end the process."""
    file = folder / "records.arrow"
    content = bytearray(file.read_bytes())
    offsets = np.arange(0, 9, 2, np.int32).tobytes()  # two candidates each
    at = content.index(offsets)
    content[at + 4 : at + 8] = (2**31 - 1).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"records.arrow is damaged \(.*\); prepare it again"):
        open_prepared(folder)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_table_that_would_grow_in_memory(folder: Path, compression: str) -> None:
    """A few kB could become a TB."""
    with pa.ipc.open_file((folder / "records.arrow").read_bytes()) as reader:
        table = reader.read_all()
    table = table.set_column(0, table.schema.field(0), pa.array(["a" * 10_000_000] * 4))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(folder / "records.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    assert (folder / "records.arrow").stat().st_size < 500_000
    with pytest.raises(ValueError, match=r"records.arrow is damaged \(its columns are compressed or .*prepare it"):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["records.arrow", "images.arrow", "images/features.json", "checksums.json"])
def test_an_endless_file(folder: Path, name: str) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(300 * 2**30)  # sparse
    with pytest.raises(ValueError, match=rf"{name} (is damaged|has 322,122,547,200 bytes; such a file has at most)"):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["records.arrow", "images.arrow"])
def test_damaged_tables_without_checksums_are_refused_or_read(folder: Path, name: str) -> None:
    """There is no traceback and no crash whatever bytes change; damage that only checksums can show is read."""
    rng, whole = np.random.default_rng(0), (folder / name).read_bytes()
    refused = 0
    for number in range(120):
        content = bytearray(whole)
        at = int(rng.integers(len(content) - 8))
        damage = [bytes([content[at] ^ 1 << number % 8]), rng.bytes(8), b"\xff\xff\xff\x7f", b""]
        content[at : at + len(damage[number % 4])] = damage[number % 4]
        (folder / name).write_bytes(content if number % 4 < 3 else content[:at])
        refused += not opens(folder)
    assert 40 < refused < 120


def opens(folder: Path) -> bool:
    try:
        pairs = open_records(folder, "train")
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - whether there is an error is not what is tested
        return False
    for index in range(len(pairs)):
        try:
            pairs.read_images(pairs[index])
        except DamagedImage:
            continue
    return True


def test_links_do_not_lead_writing_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "scores").symlink_to(tmp_path / "elsewhere")
    of = candidates(open_prepared(folder).records["images"])
    with pytest.raises(ValueError, match=r"scores/a.arrow leads out of .*data, to .*elsewhere.*; remove the link"):
        write_scores(folder, "a", "by hand", np.zeros(8, np.float32), of, {})
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be a link
    (folder / "scores").unlink()
    write_scores(tmp_path / "link", "a", "by hand", np.zeros(8, np.float32), of, {})
    assert open_prepared(tmp_path / "link", ("a",)).scored_N.all()
    shutil.rmtree(folder / "scores")
