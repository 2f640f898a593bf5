"""Makes the data that benchmarks/loader.py reads: photo-like JPEGs in Pick-a-Pic's schema, prepared and encoded."""

import io
import itertools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from PIL import Image, ImageDraw

from dpo_jax.data.images import View
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.store import checksums, latents, prepared
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.weights import safetensors_file

ROOT = Path(__file__).parents[1]
TOKENIZERS = ("tokenizer", "tokenizer_2")


class Case(NamedTuple):
    """What a contestant reads, and how."""

    folder: Path
    """Folder of `pairs.parquet`, `prepared/`, `tokenizers/`, and the table that `datasets` makes of the first."""
    resolution: int
    workers: int = 0
    flip: bool = True
    decode_twice: bool = False
    pillow: bool = False


def make_data(case: Case, records: int, distinct: int) -> int:
    """Fill the folder and return the mean size of an image in bytes."""
    photos = [photo(seed, case.resolution) for seed in range(distinct)]
    write_pickapic(case.folder / "pairs.parquet", photos, records)
    prepare(SOURCES["pickapic"], [case.folder / "pairs.parquet"], case.folder / "prepared", validation_fraction=0.0)
    write_tokenizers(case.folder / "tokenizers")
    write_encodings(case)
    return round(statistics.mean(map(len, photos)))


def photo(seed: int, side: int) -> bytes:
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    noise_HWC = random.normal(size=(side, side, 3))
    noise_HWC[..., 1:] = noise_HWC[..., :1] + noise_HWC[..., 1:] / 2  # colours of a photo are much alike
    smooth_HWC = np.fft.irfft2(np.fft.rfft2(noise_HWC, axes=(0, 1)) / frequency[..., None] ** 1.3, (side, side), (0, 1))
    image = Image.fromarray(np.clip(128 + 50 * smooth_HWC / smooth_HWC.std(), 0, 255).astype(np.uint8))
    for _ in range(8):
        (left, right), (top, bottom) = np.sort(random.integers(0, side, (2, 2)))
        colour = tuple(random.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((int(left), int(top), int(right), int(bottom)), fill=colour)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write_pickapic(file: Path, photos: Sequence[bytes], records: int) -> None:
    """Write the table; a numbered comment makes every image a different file."""

    def image(number: int) -> bytes:
        photo = photos[number % len(photos)]
        return photo[:20] + b"\xff\xfe\x00\x06" + number.to_bytes(4) + photo[20:]  # behind the JFIF header, the first

    first = [float(i % 2) for i in range(records)]
    words = "a highly detailed oil painting of a small red house by the sea, dramatic light, trending, number"
    columns = {
        "are_different": [True] * records,
        "best_image_uid": [f"{2 * i + (i + 1) % 2:032}" for i in range(records)],
        "caption": [f"{words} {i}" for i in range(records)],
        "has_label": [True] * records,
        "image_0_uid": [f"{2 * i:032}" for i in range(records)],
        "image_1_uid": [f"{2 * i + 1:032}" for i in range(records)],
        "jpg_0": [image(2 * i) for i in range(records)],
        "jpg_1": [image(2 * i + 1) for i in range(records)],
        "label_0": first,
        "label_1": [1 - label for label in first],
        "model_0": ["made"] * records,
        "model_1": ["made"] * records,
        "ranking_id": list(range(records)),
    }
    pq.write_table(pa.table(columns), file, row_group_size=100, compression="none")


def write_tokenizers(folder: Path) -> None:
    """Write the tokenizers of the bundled model, with as many tokens as SDXL's."""
    for name in TOKENIZERS:
        shutil.copytree(ROOT / "dpo_jax" / "tiny" / "model" / name, folder / name)
        config = json.loads((folder / name / "tokenizer_config.json").read_text())
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))


def write_encodings(case: Case) -> None:
    """Write random latents and embeddings of SDXL's shapes as `prepare --encode` stores them."""
    data = open_prepared(case.folder / "prepared")
    folder = encoded_folder(case)
    folder.mkdir(parents=True)
    captions = latents.distinct_captions(data)
    latents.write_captions(folder, captions)
    cells = case.resolution // 8
    tables: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
        "images": (len(data.images), {"moments": (1, cells, cells, 8)}),
        "captions": (len(captions), {"context": (77, 2048), "pooled": (1280,)}),
    }
    facts = {"family": "made", "resolution": case.resolution, "views": [View()._asdict()]}
    written: dict[str, Any] = {"facts": facts}
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for kind, (rows, shapes) in tables.items():
        a_file = latents.rows_a_file(sum(int(np.prod(shape)) for shape in shapes.values()) * bfloat16.itemsize)
        starts = range(0, rows, a_file)
        for number, start in enumerate(starts):
            header = {name: ((min(a_file, rows - start), *shape), bfloat16) for name, shape in shapes.items()}
            tensors = ((name, np.ones(shape, dtype)) for name, (shape, dtype) in header.items())
            safetensors_file.write(epath.Path(folder / latents.file_name(kind, number)), tensors, header)
        written[kind] = {"rows_a_file": a_file, "files": len(starts)}
    (folder / latents.INDEX).write_text(json.dumps(written))


def encoded_folder(case: Case) -> Path:
    return case.folder / "prepared" / "encoded" / "made"


def write_records(folder: Path, count: int) -> None:
    """Replace the records by many with the same images and captions."""
    before = open_prepared(folder)
    images = np.random.default_rng(0).integers(len(before.images), size=(count, 2)).tolist()
    captions = itertools.cycle(before.records["caption"].to_pylist())
    columns = {
        "caption": list(itertools.islice(captions, count)),
        "captions": [None] * count,
        "images": images,
        "preference": [[1.0, 0.0]] * count,
        "models": [["made", "made"]] * count,
        "split": ["train"] * count,
        "where": [f"made row {i}" for i in range(count)],
    }
    with pa.ipc.new_file(str(folder / "records.arrow"), prepared.RECORDS) as file:
        file.write_table(pa.table(columns, prepared.RECORDS), max_chunksize=10_000)
    (folder / checksums.FILE).unlink(missing_ok=True)  # of the records that were there
