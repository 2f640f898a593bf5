"""Fixtures: a small Pick-a-Pic file, a small prepared folder, and CLIP tokenizers with ids that are easy to derive."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tokenizers.pre_tokenizers import ByteLevel

MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>"]


def encode(pixels_HWC: np.ndarray, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, format, **options)
    return file.getvalue()


def noise_jpeg(seed: int) -> bytes:
    """Return noise of 40 x 56 pixels, or of 56 x 40 for odd seeds."""
    shape = (56, 40, 3) if seed % 2 else (40, 56, 3)
    return encode(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its path from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """write_pairs(n, column=values ...) writes n clean pairs in Pick-a-Pic's schema; a column of None is left out."""

    def write(number: int, name: str = "pairs.parquet", **columns: Any) -> Path:
        table = {
            "jpg_0": [noise_jpeg(2 * i) for i in range(number)],
            "jpg_1": [noise_jpeg(2 * i + 1) for i in range(number)],
            "caption": [f"prompt {i // 2}" for i in range(number)],
            "label_0": [float(i % 2) for i in range(number)],
            "label_1": [float(1 - i % 2) for i in range(number)],
            "has_label": [True] * number,
            "model_0": ["a"] * number,
            "model_1": ["b"] * number,
        } | columns
        path = tmp_path / name
        pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path, row_group_size=5)
        return path

    return write


def example_of(image: bytes) -> bytes:
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    return example.SerializeToString()


def write_prepared(folder: Path, records: Sequence[dict[str, Any]], images_per_shard: int = 5) -> Path:
    """Write records by hand in the layout of `prepare`; fields that a record does not state are filled in."""
    stored = {data: i for i, data in enumerate(dict.fromkeys(data for record in records for data in record["images"]))}
    (folder / "images").mkdir(parents=True)
    listed = list(stored)
    shards = [listed[first : first + images_per_shard] for first in range(0, len(listed), images_per_shard)]
    offsets = []
    for number, shard in enumerate(shards):
        file = folder / "images" / f"preference_images-images.parquet-{number:05}-of-{len(shards):05}"
        examples = pa.table({"data": pa.array([example_of(data) for data in shard], pa.binary())})
        pq.write_table(examples, file, compression="none", use_dictionary=False, write_statistics=False)
        content = file.read_bytes()
        offsets += [content.index(data) for data in shard]
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="preference_images", version=tfds.core.Version("1.0.0"), data_dir=str(folder / "images"), module_name=""
    )
    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("parquet")
    split = tfds.core.splits.SplitInfo("images", [len(shard) for shard in shards], 0)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder / "images")
    sizes = [Image.open(io.BytesIO(data)).size for data in stored]
    images = {
        "sha256": pa.array([hashlib.sha256(data).digest() for data in stored], pa.binary()),
        "width": pa.array([width for width, _ in sizes], pa.int32()),
        "height": pa.array([height for _, height in sizes], pa.int32()),
        "offset": pa.array(offsets, pa.int64()),
        "bytes": pa.array([len(data) for data in stored], pa.int32()),
    }
    rows = [
        {
            "captions": None,
            "preference": [1.0] + [0.0] * (len(record["images"]) - 1),
            "models": [""] * len(record["images"]),
            "split": "train",
            "where": f"made row {i}",
            "weight": 1.0,
        }
        | record
        | {"images": [stored[data] for data in record["images"]]}
        for i, record in enumerate(records)
    ]
    types = {
        "caption": pa.string(),
        "captions": pa.list_(pa.string()),
        "images": pa.list_(pa.int32()),
        "preference": pa.list_(pa.float32()),
        "models": pa.list_(pa.string()),
        "split": pa.string(),
        "where": pa.string(),
    } | ({"weight": pa.float32()} if any("weight" in record for record in records) else {})
    columns = {name: pa.array([row[name] for row in rows], type) for name, type in types.items()}
    for name, table in (("images", pa.table(images)), ("records", pa.table(columns))):
        with pa.ipc.new_file(str(folder / f"{name}.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=4)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer` pads with the end token, `tokenizer_2` with "!", as SDXL's do; 8 tokens long."""
    folder = tmp_path_factory.mktemp("model")
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        path = folder / name
        path.mkdir()
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "unk_token": "<|endoftext|>"} | special
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
