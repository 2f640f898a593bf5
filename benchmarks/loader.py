"""How fast preference data is read: by this loader, by PyTorch as diffusers' SDXL DPO script uses it, by bare decoding.

  python benchmarks/loader.py --json=loader.json

Makes two data sets in Pick-a-Pic's parquet schema, of photo-like JPEGs (noise whose amplitude falls as 1 / f^1.3, with
ellipses; quality 95) of 512 and of 1024 pixels: 102 and 339 kB an image, where Pick-a-Pic's v2 has 197 kB on
average. Each is prepared by `dpo_jax.prepare` and read at its own resolution: centre crop, random flip, two tokenizers
of 77 tokens, 8 pairs a batch, files in the page cache, on all cores, by

  bare            JPEG to an RGB array and nothing else, one process a core, with the loader's decoder (simplejpeg)
  bare pillow     the same with Pillow
  ours            `make_iterator` with threads, as without worker processes
  ours workers    `make_iterator` with one worker process a core
  cache           `make_iterator` over latents and embeddings of SDXL's shapes, as `prepare --encode` stores them
  cache workers   the same with one worker process a core
  shipped         PyTorch's DataLoader over a Hugging Face `datasets` table, as diffusers' script
                  examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py has it: it decodes the first
                  image of a pair twice, and all in the training process
  shipped workers the same with one worker process a core
  fixed           that without the second decode: the best to be had of it without rewriting it

torchvision isn't needed: what its transforms do to tensors (resize, crop, flip, normalise) is spelled out in PyTorch.
First it compares the loaders' pixels of all records, at the data's resolution and at three quarters of it.

A figure is the median of several rounds, in which the contestants take turns, each in a fresh process and timed in full
swing. Beside the pairs a second stands the CPU time that all its processes take for a pair, which other work on the
machine disturbs less. Needs 6 GB of disk in the temporary folder (TMPDIR); some twenty-five minutes on two cores. The
last result is committed beside this file.

  python benchmarks/loader.py --memory

measures instead whether the loader's memory grows with the data, or with time; see `memory_growth`.
"""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from absl import flags
from etils import epath
from PIL import Image, ImageDraw

from dpo_jax import cli
from dpo_jax.data import encoded, prepared
from dpo_jax.data.builder import prepare
from dpo_jax.data.inputs import Decoded, Inputs, Stored
from dpo_jax.data.pipeline import make_iterator, open_pairs
from dpo_jax.data.prepared import open_prepared
from dpo_jax.data.sources import SOURCES
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.weights import safetensors_file

ROOT = Path(__file__).parents[1]
TOKENIZERS = ("tokenizer", "tokenizer_2")
BATCH_SIZE = 8
CORES = len(os.sched_getaffinity(0))

TINY = flags.DEFINE_bool("tiny", False, "A few small images and one short round, to see that everything runs.")
MEMORY = flags.DEFINE_bool("memory", False, "Measure memory, not speed.")
JSON = flags.DEFINE_string("json", None, "File for the figures.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each contestant is timed.")
ONLY = flags.DEFINE_list("only", None, "Contestants to time, of those above; all if not given. Without ratios.")
SECONDS = flags.DEFINE_float("seconds", 8.0, "Time that a contestant gets in a round.")

# Pairs a second that devices train on (SDXL at 1024, all of its weights); E: predicted, not measured.
CONSUMERS = {  # name: (hosts, pairs/s from the cache, pairs/s with VAE and text encoders in the step)
    "8 x H200": (1, 8 * 8.9, 8 * 7.5),
    "v5p-128": (16, 64 / 0.118 * 0.52, 64 / 0.139 * 0.52),
}


class Case(NamedTuple):
    """What a contestant reads, and how."""

    folder: Path
    """Of `pairs.parquet`, `prepared/`, `tokenizers/`, and what `datasets` makes of the first."""
    resolution: int
    workers: int = 0
    flip: bool = True
    decode_twice: bool = False
    pillow: bool = False


def main() -> None:
    if MEMORY.value:
        return report(memory_growth(*((400, 3, 6) if TINY.value else (20_000, 50, 500))))
    results: dict[str, Any] = {"cores": CORES, "batch_size": BATCH_SIZE}
    for side in (64,) if TINY.value else (512, 1024):
        with tempfile.TemporaryDirectory() as root:
            case = Case(Path(root), side)
            results[str(side)] = {
                "bytes_an_image": make_data(case, *((48, 4) if TINY.value else (1000, 64))),
                "largest_difference_of_255": {
                    str(resolution): largest_difference(case._replace(resolution=resolution))
                    for resolution in (side, side * 3 // 4)
                },
                **race(case, *((1, 0.2) if TINY.value else (ROUNDS.value, SECONDS.value))),
            }
            print(table(side, results[str(side)]), flush=True)
    if not ONLY.value:
        results["feeding"] = feeding(results[str(side)])
        print(table_of_consumers(results["feeding"]))
    report(results)


def report(results: Any) -> None:
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=1) + "\n")


# The data.


def make_data(case: Case, records: int, distinct: int) -> int:
    """Fills the folder; returns the mean size of an image in bytes."""
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
    """Every image is another file: a comment numbers them."""

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
    """The bundled model's, with room for as many tokens as SDXL's."""
    for name in TOKENIZERS:
        shutil.copytree(ROOT / "dpo_jax" / "tiny" / "model" / name, folder / name)
        config = json.loads((folder / name / "tokenizer_config.json").read_text())
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))


def write_encodings(case: Case) -> None:
    """Random latents and embeddings of SDXL's shapes, laid out as `prepare --encode` does."""
    data = open_prepared(case.folder / "prepared")
    folder = encoded_folder(case)
    folder.mkdir(parents=True)
    captions = encoded.distinct_captions(data)
    encoded.write_captions(folder, captions)
    cells = case.resolution // 8
    tables: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
        "images": (len(data.images), {"moments": (1, cells, cells, 8)}),
        "captions": (len(captions), {"context": (77, 2048), "pooled": (1280,)}),
    }
    written: dict[str, Any] = {"facts": {"resolution": case.resolution, "views": [{}]}}
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for kind, (rows, shapes) in tables.items():
        a_file = encoded.rows_a_file(sum(int(np.prod(shape)) for shape in shapes.values()) * bfloat16.itemsize)
        starts = range(0, rows, a_file)
        for number, start in enumerate(starts):
            header = {name: ((min(a_file, rows - start), *shape), bfloat16) for name, shape in shapes.items()}
            tensors = ((name, np.ones(shape, dtype)) for name, (shape, dtype) in header.items())
            safetensors_file.write(epath.Path(folder / encoded.file_name(kind, number)), tensors, header)
        written[kind] = {"rows_a_file": a_file, "files": len(starts)}
    (folder / encoded.FACTS).write_text(json.dumps(written))


def encoded_folder(case: Case) -> Path:
    return case.folder / "prepared" / "encoded" / "made"


# The contestants: each a context in which batches are read, endlessly.


@contextlib.contextmanager
def ours(case: Case) -> Iterator[Iterator[Any]]:
    inputs = Decoded(case.resolution, load_tokenizers(case.folder / "tokenizers", TOKENIZERS), random_flip=case.flip)
    with our_batches(case, inputs) as batches:
        yield batches


@contextlib.contextmanager
def cache(case: Case) -> Iterator[Iterator[Any]]:
    with our_batches(case, Stored(encoded.Encodings(encoded_folder(case))), read_images=False) as batches:
        yield batches


def our_batches(case: Case, inputs: Inputs, read_images: bool = True) -> Any:
    pairs = open_pairs(case.folder / "prepared", "train", read_images=read_images)
    return make_iterator(pairs, inputs, batch_size=BATCH_SIZE, seed=0)


@contextlib.contextmanager
def theirs(case: Case) -> Iterator[Iterator[Any]]:
    import datasets
    import torch

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "parquet", data_files=str(case.folder / "pairs.parquet"), cache_dir=str(case.folder / "cache"), split="train"
    )
    rows = rows.with_transform(Preprocess(case))
    # Shuffled by drawing, so that no epoch ends, at which PyTorch would start its workers anew.
    sampler = torch.utils.data.RandomSampler(rows, replacement=True, num_samples=2**40) if case.flip else None
    yield iter(
        torch.utils.data.DataLoader(
            rows,
            batch_size=BATCH_SIZE,
            sampler=sampler,
            num_workers=case.workers,
            collate_fn=collate,
            multiprocessing_context="spawn" if case.workers else None,  # a fork dies of threads that we imported
        )
    )


class Preprocess:
    """What the script does to a few rows of the table, step by step."""

    def __init__(self, case: Case):
        from transformers import CLIPTokenizer

        self.case = case
        self.tokenizers = [CLIPTokenizer.from_pretrained(case.folder / "tokenizers" / name) for name in TOKENIZERS]

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        import torch

        if self.case.decode_twice:  # for the sizes alone
            sizes = [opened(data).size for data in rows["jpg_0"]]
        images = [[opened(data) for data in rows[name]] for name in ("jpg_0", "jpg_1")]
        if not self.case.decode_twice:
            sizes = [image.size for image in images[0]]
        images[1] = [image.resize(size) for image, size in zip(images[1], sizes, strict=True)]
        tensors = [[to_tensor(image) for image in column] for column in images]
        pixels, corners = [], []
        for first, second, label_0 in zip(*tensors, rows["label_0"], strict=True):
            pair_CHW = torch.cat((second, first) if label_0 == 0 else (first, second))
            pair_CHW = resized(pair_CHW, self.case.resolution)
            if self.case.flip and random.random() < 0.5:
                pair_CHW = pair_CHW.flip(-1)
            top, left = (round((side - self.case.resolution) / 2) for side in pair_CHW.shape[1:])
            pair_CHW = pair_CHW[:, top : top + self.case.resolution, left : left + self.case.resolution]
            pixels.append(pair_CHW.clone().sub_(0.5).div_(0.5))
            corners.append((top, left))
        tokens = [
            tokenizer(
                rows["caption"], truncation=True, padding="max_length", max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]  # fmt: skip
        return rows | {
            "pixels": pixels,
            "sizes": sizes,
            "corners": corners,
            "tokens_one": list(tokens[0]),
            "tokens_two": list(tokens[1]),
        }


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def to_tensor(image: Image.Image) -> Any:
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def resized(image_CHW: Any, resolution: int) -> Any:
    """Bilinear with antialiasing, the shorter side to `resolution`, as torchvision's Resize does to tensors."""
    import torch

    height, width = image_CHW.shape[1:]
    size = [int(resolution * side / min(height, width)) for side in (height, width)]
    if size == [height, width]:
        return image_CHW
    return torch.nn.functional.interpolate(image_CHW[None], size=size, mode="bilinear", antialias=True)[0]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixels", "tokens_one", "tokens_two")}
    batch["pixels"] = batch["pixels"].to(memory_format=torch.contiguous_format).float()
    return batch | {name: [row[name] for row in rows] for name in ("sizes", "corners")}


def largest_difference(case: Case) -> float:
    """Between our pixels and theirs, 0 to 255, over all records; without flips."""
    case = case._replace(flip=False)
    images = [record["images"] for record in in_order(case)]
    with theirs(case) as batches:
        largest = 0.0
        for start, batch in zip(range(0, len(images), BATCH_SIZE), batches, strict=False):
            pixels_BCHW = (batch["pixels"].numpy() * 0.5 + 0.5) * 255
            for pair, pixels_CHW in zip(images[start : start + BATCH_SIZE], pixels_BCHW, strict=True):
                for k in range(2):
                    ours_HWC = decoded(pair[k], case.resolution)
                    theirs_HWC = pixels_CHW[3 * k : 3 * k + 3].transpose(1, 2, 0)
                    largest = max(largest, float(np.abs(ours_HWC - theirs_HWC).max()))
    return round(largest, 3)


# The race.


def race(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of pairs a second and of milliseconds of CPU a pair, and their ratios."""
    write_records(case.folder / "prepared", 20_000)  # shuffling few takes Grain longer than shuffling many
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "bare": lambda: bare(case, seconds),
        "bare pillow": lambda: bare(case._replace(pillow=True), seconds),
    }
    readers: dict[str, tuple[Any, Case]] = {
        "ours": (ours, case),
        "cache": (cache, case),
        "shipped": (theirs, case._replace(decode_twice=True)),
        "shipped workers": (theirs, case._replace(decode_twice=True, workers=CORES)),
        "fixed": (theirs, case._replace(workers=CORES)),
    }
    for name, (reader, how) in readers.items():
        runs[name] = functools.partial(in_fresh_process, timed, reader, how, seconds)
    if ONLY.value:
        runs = {name: runs[name] for name in ONLY.value}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(run())
    medians = {
        name: {key: round(statistics.median(figure[key] for figure in found), 3) for key in found[0]}
        for name, found in figures.items()
    }
    if ONLY.value:
        return {"contestants": medians, "ratios": {}}
    ratios = {
        "ours / shipped": ("ours", "shipped"),
        "ours / shipped workers": ("ours", "shipped workers"),
        "ours / fixed": ("ours", "fixed"),
        "ours / bare": ("ours", "bare"),
        "ours / bare pillow": ("ours", "bare pillow"),
        "cache / shipped": ("cache", "shipped"),
        "cache / ours": ("cache", "ours"),
    }
    return {
        "contestants": medians,
        "ratios": {
            name: {
                "pairs_a_second": round(medians[a]["pairs_a_second"] / medians[b]["pairs_a_second"], 3),
                "cpu": round(medians[b]["cpu_ms_a_pair"] / medians[a]["cpu_ms_a_pair"], 3),
            }
            for name, (a, b) in ratios.items()
        },
    }


def timed(reader: Callable[[Case], Any], case: Case, seconds: float) -> dict[str, float]:
    """In full swing: what had been read ahead is used up first."""
    with reader(case) as batches:
        for _ in range(4 + 4 * case.workers):
            next(batches)
        pairs, started, cpu_started = 0, time.monotonic(), cpu_seconds()
        while (passed := time.monotonic() - started) < seconds:
            next(batches)
            pairs += BATCH_SIZE
        cpu = cpu_seconds() - cpu_started
    return {"pairs_a_second": pairs / passed, "cpu_ms_a_pair": 1000 * cpu / pairs}


def bare(case: Case, seconds: float) -> dict[str, float]:
    """All cores decode images that are in memory; none is kept."""
    files = list(itertools.chain.from_iterable(record["images"] for record in itertools.islice(in_order(case), 200)))
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(decode_for, [files] * CORES, [case.pillow] * CORES, [0.1] * CORES))
        found = list(pool.map(decode_for, [files] * CORES, [case.pillow] * CORES, [seconds] * CORES))
    images = sum(images for images, _, _ in found)
    return {
        "pairs_a_second": sum(images / passed for images, passed, _ in found) / 2,
        "cpu_ms_a_pair": 2000 * sum(cpu for _, _, cpu in found) / images,
    }


def decode_for(files: Sequence[bytes], pillow: bool, seconds: float) -> tuple[int, float, float]:
    """(images, seconds passed, CPU seconds) of one process."""
    images, started, cpu_started = 0, time.monotonic(), time.process_time()
    for data in itertools.cycle(files):
        _ = np.asarray(opened(data)) if pillow else simplejpeg.decode_jpeg(data)
        images += 1
        if (passed := time.monotonic() - started) >= seconds:
            break
    return images, passed, time.process_time() - cpu_started


def in_order(case: Case) -> Iterator[dict[str, Any]]:
    pairs = open_pairs(case.folder / "prepared", "train")
    return (pairs[i] for i in range(len(pairs)))


def decoded(data: bytes, resolution: int) -> np.ndarray:
    from dpo_jax.data.images import View, read

    image_HWC = np.empty((resolution, resolution, 3), np.uint8)
    read(data, View(), image_HWC)
    return image_HWC


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# CPU time and memory of this process and those that it started.


def family() -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(folder.name)] = int(stat(folder)[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def stat(folder: Path) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second, a name in brackets, may contain spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def cpu_seconds() -> float:
    ticks = [sum(map(int, stat(Path("/proc", str(process)))[11:13])) for process in family()]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> int:
    """Bytes that belong to a process alone, and its part of what it shares; without files, which can be dropped."""
    rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith(("Pss_Anon", "Pss_Shmem")))


def memory_growth(records: int, early: int, late: int) -> list[dict[str, Any]]:
    """What the loader holds with `records` records and with ten times as many, after `early` and `late` batches.

    The records refer to a few hundred images of 64 pixels.
    """
    results = []
    with tempfile.TemporaryDirectory() as root:
        case = Case(Path(root), 64)
        make_data(case, 200, 50)
        for times in (1, 10):
            write_records(case.folder / "prepared", records * times)
            figures = in_fresh_process(held, case, (early, late))
            results.append({"records": records * times, "bytes_after_batches": figures})
            print(json.dumps(results[-1]), flush=True)
    return results


def write_records(folder: Path, count: int) -> None:
    """Replaces the records by many, of the same images and captions."""
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


def held(case: Case, after: Sequence[int]) -> dict[str, int]:
    figures = {}
    with ours(case) as batches:
        for number in range(1, max(after) + 1):
            next(batches)
            if number in after:
                figures[str(number)] = memory(os.getpid())
    return figures


# What it means.


def feeding(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a host of each consumer reads, and on how many cores like these."""
    contestants = results["contestants"]
    moments, context, pooled = 2 * 128 * 128 * 8 * 2, 77 * 2048 * 2, 1280 * 2
    found = {}
    for name, (hosts, from_cache, from_images) in CONSUMERS.items():
        ways = {
            "images": (from_images, "ours", 2 * results["bytes_an_image"]),
            "cache": (from_cache, "cache", moments + context + pooled),
        }
        for way, (pairs_a_second, reader, bytes_a_pair) in ways.items():
            cpu = contestants[reader]["cpu_ms_a_pair"]
            found[f"{name} from {way}"] = {
                "pairs_a_second_and_host": round(pairs_a_second / hosts, 2),
                "cores_a_host": round(pairs_a_second / hosts * cpu / 1000, 2),
                "megabytes_a_second_and_host": round(pairs_a_second / hosts * bytes_a_pair / 1e6, 1),
            }
    return found


def table(side: int, results: dict[str, Any]) -> str:
    lines = [
        f"{side} x {side} pixels, {results['bytes_an_image'] / 1000:.0f} kB an image, {CORES} cores; "
        f"pixels differ by at most {max(results['largest_difference_of_255'].values())} of 255",
        f"  {'':24} {'pairs/s':>8} {'CPU ms a pair':>14}",
    ]
    for name, figures in results["contestants"].items():
        lines.append(f"  {name:24} {figures['pairs_a_second']:8.1f} {figures['cpu_ms_a_pair']:14.2f}")
    lines.append(f"  {'ratio':24} {'pairs/s':>8} {'CPU':>14}")
    for name, figures in results["ratios"].items():
        lines.append(f"  {name:24} {figures['pairs_a_second']:8.2f} {figures['cpu']:14.2f}")
    return "\n".join(lines)


def table_of_consumers(found: dict[str, dict[str, float]]) -> str:
    lines = ["What devices that train SDXL at 1024 (predicted) ask of each of their hosts, with cores like these:"]
    for name, figures in found.items():
        lines.append(
            "  {:22} {pairs_a_second_and_host:7.1f} pairs/s, {cores_a_host:5.2f} cores, "
            "{megabytes_a_second_and_host:6.1f} MB/s".format(name, **figures)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
