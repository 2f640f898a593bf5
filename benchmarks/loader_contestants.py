"""The contestants of benchmarks/loader.py: this loader and PyTorch's, each a context that yields batches endlessly, and
bare decoding."""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
from loader_data import TOKENIZERS, Case, encoded_folder
from PIL import Image

from dpo_jax.data.images import View, read
from dpo_jax.data.load.inputs import CachedInputs, Inputs, RawInputs
from dpo_jax.data.load.pipeline import make_iterator
from dpo_jax.data.load.records import open_records
from dpo_jax.data.store import latents
from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers

BATCH_SIZE = 8
CORES = len(os.sched_getaffinity(0))


@contextlib.contextmanager
def ours(case: Case) -> Iterator[Iterator[Any]]:
    inputs = RawInputs(
        case.resolution,
        load_tokenizers(case.folder / "tokenizers", [*map(TokenizerSpec, TOKENIZERS)]),
        random_flip=case.flip,
    )
    with our_batches(case, inputs) as batches:
        yield batches


@contextlib.contextmanager
def cache(case: Case) -> Iterator[Iterator[Any]]:
    with our_batches(case, CachedInputs(latents.StoredLatents(encoded_folder(case)))) as batches:
        yield batches


def our_batches(case: Case, inputs: Inputs) -> Any:
    pairs = open_records(case.folder / "prepared", "train")
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
    """The transformation that the script applies to a few rows of the table."""

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
    """Resize the shorter side to `resolution`, bilinear with antialiasing, as torchvision's Resize does to tensors."""
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
    """Return the largest difference between the loaders' pixels, 0 to 255, over all records, without flips."""
    case = case._replace(flip=False)
    images = list(in_order(case))
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


def bare(case: Case, seconds: float) -> dict[str, float]:
    """Decode images from memory on all cores; none is kept."""
    files = list(itertools.chain.from_iterable(itertools.islice(in_order(case), 200)))
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(decode_for, [files] * CORES, [case.pillow] * CORES, [0.1] * CORES))
        found = list(pool.map(decode_for, [files] * CORES, [case.pillow] * CORES, [seconds] * CORES))
    images = sum(images for images, _, _ in found)
    return {
        "pairs_a_second": sum(images / passed for images, passed, _ in found) / 2,
        "cpu_ms_a_pair": 2000 * sum(cpu for _, _, cpu in found) / images,
    }


def decode_for(files: Sequence[bytes], pillow: bool, seconds: float) -> tuple[int, float, float]:
    """Return (images, seconds passed, CPU seconds) of one process."""
    images, started, cpu_started = 0, time.monotonic(), time.process_time()
    for data in itertools.cycle(files):
        _ = np.asarray(opened(data)) if pillow else simplejpeg.decode_jpeg(data)
        images += 1
        if (passed := time.monotonic() - started) >= seconds:
            break
    return images, passed, time.process_time() - cpu_started


def in_order(case: Case) -> Iterator[list[bytes]]:
    pairs = open_records(case.folder / "prepared", "train")
    return ([bytes(image) for image in pairs.read_images(pairs[i])] for i in range(len(pairs)))


def decoded(data: bytes, resolution: int) -> np.ndarray:
    image_HWC = np.empty((resolution, resolution, 3), np.uint8)
    read(data, View(), image_HWC)
    return image_HWC
